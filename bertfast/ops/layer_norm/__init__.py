"""layer_norm: check, dispatch, autograd. The public function, the registered ops, their Function.

Every tensor but x has one dtype, that of the output (the "stream"); x may be of a 16-bit dtype
below a float32 stream, which is how a Linear's output arrives under autocast.
"""

import math
import operator

import torch

from ... import checks
from .. import derivatives, dispatch, dropout
from ..rows import as_rows
from . import reference


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-12,
    residual: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    site: int = 0,
    row_index: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """LayerNorm(dropout(x + x_bias) + residual) * weight + bias, over the last dimension.

    x and residual have any leading shape; x_bias, weight and bias have the shape of a row. All
    dtypes are x's. Under autocast each may have its own, and the output has the dtype that torch's
    layer_norm(x + residual) has there: float32 on CUDA.

    The dropout mask is a function of (seed, site, row, column). seed is an int64 tensor with one
    element on x's device, drawn from torch's generator if it is None. site tells a layer's dropouts
    apart. row_index (int64, one number a row) makes the rows of a packed batch draw what they would
    draw in the padded one. The caller decides about training: dropout_p = 0 means none.

    backend: "auto", "torch", "triton" or "cuda"; an explicit one that can't run here raises
    ValueError.
    """
    checks.check_float("x", x)
    shape, device, dtype = x.shape, x.device, x.dtype
    if not shape or shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of 1 or more, got {checks.shape(x)}")
    row, device_type = shape[-1:], device.type
    autocast = dtype != torch.float64 and dispatch.autocast_enabled(device_type)
    expected = None if autocast else dtype
    checks.check_like("weight", weight, row, device, expected)
    checks.check_like("bias", bias, row, device, expected)
    if x_bias is not None:
        checks.check_like("x_bias", x_bias, row, device, expected)
    if residual is not None:
        checks.check_like("residual", residual, shape, device, expected)
    checks.check_number("eps", eps, least=0)
    checks.check_dropout(dropout_p, site)
    if seed is not None:
        checks.check_seed(seed, device)
    if row_index is not None:
        checks.check_row_index(row_index, math.prod(shape[:-1]), device)
    width = operator.index(row[0])  # under torch.compile(dynamic=True) too, the width is a constant
    backend = dispatch.choose("layer_norm", backend, device_type, dtype, width)

    out_dtype = None
    if autocast:
        out_dtype = dispatch.autocast_dtype(x, residual)
        weight, bias = weight.float(), bias.float()
        x_bias = None if x_bias is None else x_bias.float()
        residual = None if residual is None else residual.float()
    threshold = dropout.threshold(dropout_p)
    if threshold and seed is None:
        seed = dropout.draw_seed(device)
    args = (x, weight, bias, residual, x_bias, seed, row_index, eps, threshold, site)
    if backend == "torch" or dispatch.only_reference():
        y = reference.forward(*args)
    else:
        plain = dispatch.plain_call(*args[:7])
        if torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in args[:5]
        ):
            if not plain:
                args = (*dispatch.distinct(args[:5]), *args[5:])
            y, _ = (_apply if plain else _LayerNorm.apply)(*args, backend, plain)
        else:
            y = (_infer_impl if plain else _infer)(*args, backend)
    return y if out_dtype is None else y.to(out_dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        residual,
        x_bias,
        seed,
        row_index,
        eps,
        threshold,
        site,
        backend,
        plain,
    ):
        y, z, mean, rstd = (_forward_impl if plain else _forward)(
            x, weight, bias, residual, x_bias, seed, row_index, eps, threshold, site, backend
        )
        # Without bias, dropout and residual z is x: nothing to write, the backward reads x.
        z = z if z.numel() else x
        ctx.save_for_backward(z, mean, rstd, weight, seed, row_index)
        ctx.constants = threshold, site, backend, x.dtype
        ctx.set_materialize_grads(False)
        # rstd is an output for what it is saved as: by it a second derivative finds x and residual,
        # which aren't saved.
        return y, rstd

    @staticmethod
    @derivatives.first_only
    def backward(ctx, saved, dy, _):
        if dy is None:
            return (None,) * 12
        z, mean, rstd, weight, seed, row_index = saved
        threshold, site, backend, x_dtype = ctx.constants
        need_x, need_weight, need_bias, need_residual, need_x_bias = ctx.needs_input_grad[:5]
        # Without dropout dx is dz: computed once, returned twice.
        same = not threshold and x_dtype == weight.dtype
        plain = dispatch.plain_backward(dy, z, weight)
        dz, dx, dweight, dbias, dx_bias = (_backward_impl if plain else _backward)(
            dy,
            z,
            mean,
            rstd,
            weight,
            seed,
            row_index,
            threshold,
            site,
            need_residual or (need_x and same),
            x_dtype if need_x and not same else None,
            need_weight or need_bias,
            need_x_bias,
            backend,
        )
        return (
            (dz if same else dx) if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            dz if need_residual else None,
            dx_bias if need_x_bias else None,
            *(None,) * 7,
        )


# apply without its Python wrapper, which only serves functorch and takes 3 us.
_apply = super(torch.autograd.Function, _LayerNorm).apply

# The registered ops. Fixed arity and one Python implementation each: the cheapest registered form.
_library = torch.library.Library("bertfast", "FRAGMENT")
_INPUTS = (
    "Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor? x_bias, Tensor? seed, "
    "Tensor? row_index, float eps, int threshold, int site, str backend"
)
_library.define(f"layer_norm({_INPUTS}) -> Tensor")
_library.define(f"layer_norm_forward({_INPUTS}) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)")
_library.define(
    "layer_norm_backward(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor? seed, Tensor? row_index, int threshold, int site, bool want_dz, "
    "ScalarType? dx_dtype, bool want_params, bool want_x_bias, str backend) "
    "-> (Tensor dz, Tensor dx, Tensor dweight, Tensor dbias, Tensor dx_bias)"
)


def _saves_z(x, weight, residual, x_bias, threshold) -> bool:
    """Whether z differs from x, in value or in dtype."""
    same = residual is None and x_bias is None and threshold == 0
    return not same or x.dtype != weight.dtype


def _new(x, weight):
    # Spread out, as torch takes three times as long to read a torch.Size.
    return torch.empty(*x.shape, dtype=weight.dtype, device=x.device)


def _run(x, weight, bias, residual, x_bias, seed, row_index, eps, threshold, site, backend, outs):
    if x.numel():
        y, z, stats = outs
        dispatch.backend_module("layer_norm", backend).forward(
            as_rows(x),
            weight.contiguous(),
            bias.contiguous(),
            as_rows(residual),
            None if x_bias is None else x_bias.contiguous(),
            seed,
            None if row_index is None else row_index.contiguous(),
            eps,
            threshold,
            site,
            y,
            z,
            stats,
        )


def _infer_impl(x, weight, *args):
    y = _new(x, weight)
    _run(x, weight, *args, (y, None, None))
    return y


def _forward_impl(
    x, weight, bias, residual, x_bias, seed, row_index, eps, threshold, site, backend
):
    y, z, mean, rstd = _forward_fake(
        x, weight, bias, residual, x_bias, seed, row_index, eps, threshold, site, backend
    )
    _run(
        *(x, weight, bias, residual, x_bias, seed, row_index, eps, threshold, site, backend),
        (y, z if _saves_z(x, weight, residual, x_bias, threshold) else None, (mean, rstd)),
    )
    return y, z, mean, rstd


def _forward_fake(
    x, weight, bias, residual, x_bias, seed, row_index, eps, threshold, site, backend
):
    device, rows = x.device, math.prod(x.shape[:-1])
    return (
        _new(x, weight),
        _new(x, weight)
        if _saves_z(x, weight, residual, x_bias, threshold)
        else torch.empty(0, dtype=x.dtype, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def _backward_fake(
    dy,
    z,
    mean,
    rstd,
    weight,
    seed,
    row_index,
    threshold,
    site,
    want_dz,
    dx_dtype,
    want_params,
    want_x_bias,
    backend,
):
    device = dy.device

    def new(like, wanted, dtype=None):
        # What isn't wanted is an empty tensor: an op returns a fixed number of outputs.
        shape = like.shape if wanted else (0,)
        return torch.empty(*shape, dtype=dtype or weight.dtype, device=device)

    return (
        new(dy, want_dz),
        new(dy, dx_dtype is not None, dx_dtype),
        new(weight, want_params),
        new(weight, want_params),
        new(weight, want_x_bias),
    )


def _backward_impl(dy, z, mean, rstd, weight, seed, row_index, threshold, site, *wanted):
    want_dz, dx_dtype, want_params, want_x_bias, backend = wanted
    outs = _backward_fake(dy, z, mean, rstd, weight, seed, row_index, threshold, site, *wanted)
    dz, dx, dweight, dbias, dx_bias = outs
    if not dy.numel():
        for sum_ in (dweight, dbias, dx_bias):
            sum_.zero_()
        return outs
    dispatch.backend_module("layer_norm", backend).backward(
        as_rows(dy),
        as_rows(z),
        mean,
        rstd,
        weight.contiguous(),
        seed,
        None if row_index is None else row_index.contiguous(),
        threshold,
        site,
        dz if want_dz else None,
        dx if dx_dtype is not None else None,
        (dweight, dbias) if want_params else None,
        dx_bias if want_x_bias else None,
    )
    return outs


for _name, _impl, _fake in (
    ("layer_norm", _infer_impl, lambda x, weight, *_: _new(x, weight)),
    ("layer_norm_forward", _forward_impl, _forward_fake),
    ("layer_norm_backward", _backward_impl, _backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _impl, _key)
    torch.library.register_fake(f"bertfast::{_name}", _fake, lib=_library)
derivatives.register_batched("layer_norm_backward", _library)

_infer = torch.ops.bertfast.layer_norm.default
_forward = torch.ops.bertfast.layer_norm_forward.default
_backward = torch.ops.bertfast.layer_norm_backward.default
