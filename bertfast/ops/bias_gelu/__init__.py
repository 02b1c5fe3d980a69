"""bias_gelu: check, dispatch, autograd. The public function, the registered ops, their Function.

The bias has the dtype of the output; x has it too, or under autocast a 16-bit one below float32.
"""

import torch

from ... import checks
from .. import derivatives, dispatch
from ..rows import as_rows
from . import reference

APPROXIMATE = ("none", "tanh")


def bias_gelu(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    approximate: str = "none",
    backend: str = "auto",
) -> torch.Tensor:
    """gelu(x + bias): the exact one, by erf, or with approximate="tanh" BERT's first.

    x has any shape; bias, if it is given, has the shape of a row and x's dtype. Under autocast the
    two may differ, and the output has the dtype of F.gelu(x + bias), which no autocast touches:
    that of the sum. To get what a Linear with its bias would give, cast the bias to x's dtype.

    Only x and bias are saved for the backward. An infinite value gives the limits, Inf and 0 (torch
    gives NaN for some); the torch backend does as torch does.

    backend: "auto", "torch", "triton" or "cuda"; an explicit one that can't run here raises
    ValueError.
    """
    checks.check_float("x", x)
    shape, device, dtype = x.shape, x.device, x.dtype
    device_type = device.type
    if bias is not None:
        if not shape:
            raise ValueError("x must have a last dimension (the bias's), got []")
        autocast = dtype != torch.float64 and dispatch.autocast_enabled(device_type)
        checks.check_like("bias", bias, shape[-1:], device, None if autocast else dtype)
        if bias.dtype != dtype:
            dtype = torch.promote_types(dtype, bias.dtype)
    checks.check_choice("approximate", approximate, APPROXIMATE)
    backend = dispatch.choose("bias_gelu", backend, device_type, dtype)

    tanh = approximate == "tanh"
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if backend == "torch" or dispatch.only_reference():
        return reference.forward(x, bias, tanh)
    plain = dispatch.plain_call(x, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        if not plain:
            x, bias = dispatch.distinct((x, bias))
        return (_apply if plain else _BiasGelu.apply)(x, bias, tanh, backend, plain)
    return (_forward_impl if plain else _forward)(x, bias, tanh, backend)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, tanh, backend, plain):
        ctx.save_for_backward(x, bias)
        ctx.constants = tanh, backend
        return (_forward_impl if plain else _forward)(x, bias, tanh, backend)

    @staticmethod
    @derivatives.first_only
    def backward(ctx, saved, dy):
        x, bias = saved
        tanh, backend = ctx.constants
        need_x, need_bias = ctx.needs_input_grad[:2]
        plain = dispatch.plain_backward(dy, x, bias)
        dx, dbias = (_backward_impl if plain else _backward)(
            dy, x, bias, tanh, need_x, need_bias, backend
        )
        return dx if need_x else None, dbias if need_bias else None, None, None, None


# apply without its Python wrapper, which only serves functorch and takes 3 us.
_apply = super(torch.autograd.Function, _BiasGelu).apply

# The registered ops. Fixed arity and one Python implementation each: the cheapest registered form.
_library = torch.library.Library("bertfast", "FRAGMENT")
_library.define("bias_gelu(Tensor x, Tensor? bias, bool tanh, str backend) -> Tensor")
_library.define(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool want_dx, "
    "bool want_dbias, str backend) -> (Tensor dx, Tensor dbias)"
)


def _new(shape, like):
    # Spread out, as torch takes three times as long to read a torch.Size.
    return torch.empty(*(shape or ((),)), dtype=like.dtype, device=like.device)


def _forward_fake(x, bias, tanh, backend):
    return _new(x.shape, x if bias is None else bias)


def _forward_impl(x, bias, tanh, backend):
    y = _forward_fake(x, bias, tanh, backend)
    if x.numel():
        dispatch.backend_module("bias_gelu", backend).forward(
            as_rows(x), None if bias is None else bias.contiguous(), tanh, y
        )
    return y


def _backward_fake(dy, x, bias, tanh, want_dx, want_dbias, backend):
    # What isn't wanted is an empty tensor: an op returns a fixed number of outputs.
    return (
        _new(x.shape if want_dx else (0,), x),
        _new(bias.shape, bias) if want_dbias else _new((0,), x),
    )


def _backward_impl(dy, x, bias, tanh, want_dx, want_dbias, backend):
    dx, dbias = outs = _backward_fake(dy, x, bias, tanh, want_dx, want_dbias, backend)
    if not dy.numel():
        dbias.zero_()
        return outs
    dispatch.backend_module("bias_gelu", backend).backward(
        as_rows(dy),
        as_rows(x),
        None if bias is None else bias.contiguous(),
        tanh,
        dx if want_dx else None,
        dbias if want_dbias else None,
    )
    return outs


for _name, _impl, _fake in (
    ("bias_gelu", _forward_impl, _forward_fake),
    ("bias_gelu_backward", _backward_impl, _backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _impl, _key)
    torch.library.register_fake(f"bertfast::{_name}", _fake, lib=_library)
derivatives.register_batched("bias_gelu_backward", _library)

_forward = torch.ops.bertfast.bias_gelu.default
_backward = torch.ops.bertfast.bias_gelu_backward.default
