"""gated: check, choose a backend, run. The public function.

All tensors have x's dtype. Under autocast a bias of another one is cast, as that of a Linear is.
"""

import torch

from ... import checks, tracing
from .. import dispatch
from ..registration import any_requires_grad, distinct
from . import limits, reference, registered

__all__ = ["gated"]

HALVES = ("first", "second")


def gated(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "gelu",
    activated: str = "first",
    backend: str = "auto",
) -> torch.Tensor:
    """act(u) * v of the two halves of x + bias along the last dimension: GeGLU and SwiGLU.

    x has any shape (..., 2 * width), as one product gives it, and is read where it lies; the result
    has (..., width). bias, if it is given, has the shape of a row of x, and x's dtype; under
    autocast it is cast to that.

    activation: "gelu", the exact one by erf; "gelu_tanh"; or "silu", which makes it SwiGLU.

    activated: the half that the activation is applied to. "first" is the order of ModernBERT's Wi,
    and of gate_proj and up_proj joined in transformers' NomicBERT, GTE and EuroBERT; "second" is
    that of GTE's own up_gate_proj, and of Nomic's own fc11 and fc12 joined.

    Only x and bias are saved for the backward, which writes both halves of one gradient. Of an
    infinite u the activation is its limit, Inf or 0 (torch gives NaN for some); the torch backend
    does as torch does.

    backend: "auto", "torch", "triton" or "cuda"; an explicit one that can't run here raises
    ValueError.
    """
    checks.check_float("x", x)
    shape, device, dtype = x.shape, x.device, x.dtype
    if not shape or shape[-1] % 2:
        raise ValueError(
            "x must have a last dimension of an even size, for two halves, "
            f"got shape {checks.shape(x)}"
        )
    if bias is not None:
        expected = dtype if tracing.autocast(x) is None else None
        checks.check_like("bias", bias, shape[-1:], device, expected)
    checks.check_choice("activation", activation, limits.ACTIVATIONS)
    checks.check_choice("activated", activated, HALVES)
    backend = dispatch.choose("gated", backend, device, dtype)

    second = activated == "second"
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if backend == "torch" or tracing.only_reference():
        return reference.forward(x, bias, activation, second)
    plain = tracing.plain_call(x, bias)
    if any_requires_grad(x, bias):
        if plain:
            return registered.apply_plain(x, bias, activation, second, backend, plain)
        return registered.Gated.apply(*distinct((x, bias)), activation, second, backend, plain)
    return registered.forward.call(plain)(x, bias, activation, second, backend)
