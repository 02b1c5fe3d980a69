"""layer_norm: check, choose a backend, run. The public function.

Every tensor but x has one dtype, that of the output (the "stream"); x may be of a 16-bit dtype
below a float32 stream, which is how a Linear's output arrives under autocast.
"""

import math
import operator

import torch

from ... import checks, tracing
from .. import dispatch, dropout
from ..registration import any_requires_grad, distinct
from . import reference, registered, run
from .run import Norm

__all__ = ["layer_norm"]


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
    layer_norm(x + residual) has there: float32 on CUDA. eps is added to a row's variance.

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
    row = shape[-1:]
    autocast = tracing.autocast(x) is not None
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
    requested = backend
    backend = dispatch.choose("layer_norm", backend, device, dtype, width)

    out_dtype = None
    if autocast:
        out_dtype = dispatch.autocast_dtype(x, residual)
        weight, bias = weight.float(), bias.float()
        x_bias = None if x_bias is None else x_bias.float()
        residual = None if residual is None else residual.float()
    if requested == "auto" and dropout.may_be_torchs(backend, device, dropout_p, seed):
        drop = dropout.torchs(dropout_p)
    else:
        drop = dropout.dropout_of(dropout_p, seed, site, device, row_index)
    if backend == "torch" or tracing.only_reference():
        y = reference.forward(x, Norm(weight, bias, eps), x_bias, residual, drop)
    else:
        tensors = (x, weight, bias, residual, x_bias)
        rest = (drop.seed, drop.rows, eps, drop.threshold, drop.site, backend)
        plain = tracing.plain_call(*tensors, drop.seed, drop.rows)
        if any_requires_grad(*tensors):
            if plain:
                y, _ = registered.apply_plain(*tensors, *rest, plain)
            else:
                y, _ = registered.LayerNorm.apply(*distinct(tensors), *rest, plain)
        elif plain:
            y = run.forward(x, Norm(weight, bias, eps), x_bias, residual, drop, backend, False).y
        else:
            y = registered.infer.dispatched(*tensors, *rest)
    return y if out_dtype is None else y.to(out_dtype)
