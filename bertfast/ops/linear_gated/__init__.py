"""linear_gated: a matrix product and the gated activation of its halves. The public function.

As linear_gelu (bertfast/ops/linear): two kernels, or where `bertfast tune` found it faster one.
"""

import torch
import torch.nn.functional as F

from ... import checks, tracing
from .. import dispatch
from ..gated import gated
from ..gated.limits import ACTIVATIONS
from ..linear import fused as fused_kernel
from ..linear import linear
from ..registration import any_requires_grad, distinct
from . import registered, run

__all__ = ["linear_gated"]


def linear_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "gelu",
    fused: bool | None = None,
    training: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """act(g) * v of the two halves of x weight^T + bias: the first part of a GeGLU or SwiGLU MLP.

    x is (..., inputs), weight (2 * width, inputs), first the rows of the half that the activation
    is applied to; the result is (..., width). The product of x, weight and bias is as in `linear`,
    training too.

    fused: True for one kernel that makes the product and the activation, in float16 or bfloat16,
    with multiples of 8 as inputs and width; where it can't run, ValueError. False for torch's
    product and the op after it. None, the default, for the faster one as `bertfast tune` found it
    on this GPU; without that, or while something is traced, two. Both round the product before its
    bias is added.

    activation and backend are as in `gated`, whose kernel adds the bias where it runs.
    """
    checks.check_float("x", x)
    checks.check_product(x, weight, bias, tracing.autocast(x) is not None)
    wide = weight.shape[0]
    if wide % 2:
        raise ValueError(
            "weight must have an even number of rows, for two halves, "
            f"got shape {checks.shape(weight)}"
        )
    checks.check_choice("activation", activation, ACTIVATIONS)
    dtype = tracing.autocast(x) or x.dtype
    chosen = fused_kernel.backend_of(
        *(run.OPS, x, weight, wide // 2, dtype, fused, backend),
    )
    if chosen is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        plain = tracing.plain_call(x, weight, bias)
        if any_requires_grad(x, weight, bias):
            apply = registered.apply_plain if plain else registered.LinearGated.apply
            given = (x, weight, bias) if plain else distinct((x, weight, bias))
            return apply(*given, activation, chosen, plain)
        return registered.forward.call(plain)(x, weight, bias, activation, False, chosen)[0]
    chosen = dispatch.choose("gated", backend, x.device, dtype)
    if chosen == "torch":
        u, bias = linear(x, weight, bias, training=training, backend=backend), None
    else:
        u = F.linear(x, weight)
        bias = None if bias is None else bias.to(u.dtype)
    return gated(u, bias, activation=activation, backend=chosen)
