"""bias_gelu: check, choose a backend, run. The public function.

The bias has the dtype of the output; x has it too, or under autocast a 16-bit one below float32.
"""

import torch

from ... import checks, tracing
from .. import dispatch
from ..registration import any_requires_grad, distinct
from . import reference, registered

__all__ = ["bias_gelu"]

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
    if bias is not None:
        if not shape:
            raise ValueError("x must have a last dimension (the bias's), got []")
        expected = dtype if tracing.autocast(x) is None else None
        checks.check_like("bias", bias, shape[-1:], device, expected)
        if bias.dtype != dtype:
            dtype = torch.promote_types(dtype, bias.dtype)
    checks.check_choice("approximate", approximate, APPROXIMATE)
    backend = dispatch.choose("bias_gelu", backend, device, dtype)

    tanh = approximate == "tanh"
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if backend == "torch" or tracing.only_reference():
        return reference.forward(x, bias, tanh)
    plain = tracing.plain_call(x, bias)
    if any_requires_grad(x, bias):
        if plain:
            return registered.apply_plain(x, bias, tanh, backend, plain)
        return registered.BiasGelu.apply(*distinct((x, bias)), tanh, backend, plain)
    return registered.forward.call(plain)(x, bias, tanh, backend)
