"""linear, linear_gelu, linear_norm: matrix products with what follows them. The public functions.

Each is a product and the op after it; where a bias, a GELU, a residual or a dropout is added is the
backend's affair. With the kernels of bias_gelu and layer_norm the product leaves its bias to them,
which add it while the values are in registers. With torch the product adds it; on a CPU oneDNN's
fused products do more, where they win (onednn.py). On a GPU one kernel may make a product and its
GELU, where `bertfast tune` found that faster (run.py).

backend: as in those ops, whose choice it is; products are torch's. training: the flag of the module
that asks. A CPU's products in training are always torch's own.
"""

import torch
import torch.nn.functional as F

from ... import checks, tracing
from .. import dispatch
from ..bias_gelu import APPROXIMATE, bias_gelu
from ..layer_norm import layer_norm
from ..registration import any_requires_grad, distinct
from . import fused as fused_kernel
from . import onednn, registered, run

__all__ = ["linear_gelu"]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    training: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """x weight^T + bias, over the last dimension.

    x has any leading shape, weight is (outputs, inputs), bias has one number an output. All have
    one dtype, but under autocast. training: the flag of the module that asks; in training a CPU's
    products are torch's own, else oneDNN's where they are faster. backend: as in the ops that
    follow products; the product itself is torch's.
    """
    _check(x, weight, bias)
    checks.check_choice("backend", backend, dispatch.CHOICES)
    if backend == "auto" and onednn.serves(x, weight, training):
        return onednn.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    approximate: str = "none",
    fused: bool | None = None,
    training: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """gelu(x weight^T + bias). The product of x, weight and bias is as in `linear`, training too.

    fused: True for one kernel that makes the product and the GELU, in float16 or bfloat16, with
    multiples of 8 as inputs and outputs; where it can't run, ValueError. False for torch's product
    and the op after it. None, the default, for the faster one as `bertfast tune` found it on this
    GPU; without that, or while something is traced, two. Both round the product before its bias is
    added.

    approximate and backend are as in `bias_gelu`, whose kernel adds the bias where it runs.
    """
    _check(x, weight, bias)
    checks.check_choice("approximate", approximate, APPROXIMATE)
    dtype = tracing.autocast(x) or x.dtype
    tanh = approximate == "tanh"
    chosen = fused_kernel.backend_of(
        *(run.GELU, x, weight, weight.shape[0], dtype, fused, backend),
    )
    if chosen is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        plain = tracing.plain_call(x, weight, bias)
        if any_requires_grad(x, weight, bias):
            apply = registered.apply_plain if plain else registered.LinearGelu.apply
            given = (x, weight, bias) if plain else distinct((x, weight, bias))
            return apply(*given, tanh, chosen, plain)
        return registered.forward.call(plain)(x, weight, bias, tanh, False, chosen)[0]
    chosen = dispatch.choose("bias_gelu", backend, x.device, dtype)
    if chosen != "torch":
        y = F.linear(x, weight)
        bias = None if bias is None else bias.to(y.dtype)
    elif backend == "auto" and onednn.serves(x, weight, training, approximate):
        return onednn.linear_gelu(x, weight, bias, approximate)
    else:
        y, bias = F.linear(x, weight, bias), None
    return bias_gelu(y, bias, approximate=approximate, backend=chosen)


def linear_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    *,
    residual: torch.Tensor,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    site: int = 0,
    row_index: torch.Tensor | None = None,
    training: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """LayerNorm(dropout(x weight^T + bias) + residual) * norm_weight + norm_bias.

    The product of x, weight and bias is as in `linear`, training too. Its rows are those of
    `layer_norm`, to which norm_weight and norm_bias, residual, eps, dropout_p, seed, site,
    row_index and backend belong, and whose kernel adds the bias where it runs.
    """
    _check(x, weight, bias)
    dtype = tracing.autocast(x) or x.dtype
    chosen = dispatch.choose("layer_norm", backend, x.device, dtype, int(weight.shape[0]))
    added: torch.Tensor | None = residual
    if chosen != "torch":
        y = F.linear(x, weight)
    elif backend == "auto" and not dropout_p and onednn.serves(x, weight, training):
        y = linear_add(x, weight, bias, residual=residual, training=training)
        bias, added = None, None
    else:
        y, bias = F.linear(x, weight, bias), None
    return layer_norm(
        y,
        norm_weight,
        norm_bias,
        eps=eps,
        residual=added,
        x_bias=bias,
        dropout_p=dropout_p,
        seed=seed,
        site=site,
        row_index=row_index,
        backend=backend if chosen == "torch" else chosen,  # "auto" may mean more than a choice
    )


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    residual: torch.Tensor,
    training: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """x weight^T + bias + residual"""
    _check(x, weight, bias)
    if backend == "auto" and onednn.serves(x, weight, training):
        shape = torch.Size((*x.shape[:-1], weight.shape[0]))
        checks.check_like("residual", residual, shape, x.device, x.dtype)
        return onednn.linear_add(x, residual, weight, bias)
    return F.linear(x, weight, bias) + residual


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    checks.check_float("x", x)
    checks.check_product(x, weight, bias, tracing.autocast(x) is not None)
