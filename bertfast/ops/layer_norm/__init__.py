"""layer_norm and rms_norm: check, choose a backend, run. The public functions.

Every tensor but x has one dtype, that of the output (the "stream"); x may be of a 16-bit dtype
below a float32 stream, which is how a Linear's output arrives under autocast.
"""

import math
import operator
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch

from ... import checks, tracing
from .. import dispatch, dropout
from ..registration import any_requires_grad, distinct
from . import reference, registered, run
from .run import Kept, Norm

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["layer_norm"]

_Pair = tuple[torch.Tensor, torch.Tensor]


class _Options(TypedDict, total=False):
    """Keyword arguments on which the kind of result doesn't depend, for type checkers."""

    eps: float
    residual: torch.Tensor | None
    x_bias: torch.Tensor | None
    dropout_p: float
    seed: torch.Tensor | None
    site: int
    row_index: torch.Tensor | None
    backend: str


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    return_sum: Literal[False] = False,
    **options: "Unpack[_Options]",
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    return_sum: Literal[True],
    **options: "Unpack[_Options]",
) -> _Pair: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    return_sum: bool,
    **options: "Unpack[_Options]",
) -> torch.Tensor | _Pair: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-12,
    residual: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    site: int = 0,
    row_index: torch.Tensor | None = None,
    return_sum: bool = False,
    backend: str = "auto",
) -> torch.Tensor | _Pair:
    """LayerNorm(dropout(x + x_bias) + residual) * weight + bias, over the last dimension.

    x and residual have any leading shape; x_bias, weight and bias have the shape of a row; bias may
    be None. All dtypes are x's. Under autocast each may have its own, and the output has the dtype
    that torch's layer_norm(x + residual) has there: float32 on CUDA. eps is added to a row's
    variance.

    return_sum: the result is a pair, the output and dropout(x + x_bias) + residual, which layers
    with their norm in front carry on. The sum has the output's dtype; what is normalised is not
    rounded to it.

    The dropout mask is a function of (seed, site, row, column). seed is an int64 tensor with one
    element on x's device, drawn from torch's generator if it is None. site tells a layer's dropouts
    apart. row_index (int64, one number a row) makes the rows of a packed batch draw what they would
    draw in the padded one. The caller decides about training: dropout_p = 0 means none.

    backend: "auto", "torch", "triton" or "cuda"; an explicit one that can't run here raises
    ValueError.
    """
    drops = (dropout_p, seed, site, row_index)
    norm = Norm(weight, bias, eps)
    return _norm(x, norm, residual, x_bias, drops, return_sum, backend)


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    return_sum: Literal[False] = False,
    **options: "Unpack[_Options]",
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    return_sum: Literal[True],
    **options: "Unpack[_Options]",
) -> _Pair: ...
@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    return_sum: bool,
    **options: "Unpack[_Options]",
) -> torch.Tensor | _Pair: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    site: int = 0,
    row_index: torch.Tensor | None = None,
    return_sum: bool = False,
    backend: str = "auto",
) -> torch.Tensor | _Pair:
    """z / sqrt(mean(z * z) + eps) * weight with z = dropout(x + x_bias) + residual, over the last
    dimension. Everything else is as in `layer_norm`; under autocast the output has its dtype, too.
    """
    drops = (dropout_p, seed, site, row_index)
    norm = Norm(weight, None, eps, rms=True)
    return _norm(x, norm, residual, x_bias, drops, return_sum, backend)


def _norm(
    x: torch.Tensor,
    norm: Norm,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    drops: tuple[float, torch.Tensor | None, int, torch.Tensor | None],
    return_sum: bool,
    backend: str,
) -> torch.Tensor | _Pair:
    """drops: dropout_p, seed, site and row_index."""
    weight, bias, eps, rms = norm
    dropout_p, seed, site, row_index = drops
    checks.check_float("x", x)
    shape, device, dtype = x.shape, x.device, x.dtype
    if not shape or shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of 1 or more, got {checks.shape(x)}")
    row = shape[-1:]
    autocast = tracing.autocast(x) is not None
    expected = None if autocast else dtype
    checks.check_like("weight", weight, row, device, expected)
    if bias is not None:
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
    checks.check_bool("return_sum", return_sum)
    width = operator.index(row[0])  # under torch.compile(dynamic=True) too, the width is a constant
    requested = backend
    backend = dispatch.choose("layer_norm", backend, device, dtype, width)

    out_dtype = None
    if autocast:
        out_dtype = dispatch.autocast_dtype(x, residual)
        weight, bias = weight.float(), _float(bias)
        x_bias, residual = _float(x_bias), _float(residual)
        norm = Norm(weight, bias, eps, rms)
    if requested == "auto" and dropout.may_be_torchs(backend, device, dropout_p, seed):
        drop = dropout.torchs(dropout_p)
    else:
        drop = dropout.dropout_of(dropout_p, seed, site, device, row_index)
    sum_: torch.Tensor | None = None
    if backend == "torch" or tracing.only_reference():
        y, sum_ = reference.forward(x, norm, x_bias, residual, drop)
    else:
        tensors = (x, weight, bias, residual, x_bias)
        rest = (drop.seed, drop.rows, eps, rms, drop.threshold, drop.site, backend)
        plain = tracing.plain_call(*tensors, drop.seed, drop.rows)
        if any_requires_grad(*tensors):
            if plain:
                y, sum_, _ = registered.apply_plain(*tensors, *rest, return_sum, plain)
            else:
                given = distinct(tensors)
                y, sum_, _ = registered.LayerNorm.apply(*given, *rest, return_sum, plain)
        elif plain:
            kept = Kept(False, return_sum)
            y, sum_, *_ = run.forward(x, norm, x_bias, residual, drop, backend, kept)
        elif return_sum:
            y, sum_, *_ = registered.forward.dispatched(*tensors, *rest, return_sum)
        else:
            y = registered.infer.dispatched(*tensors, *rest)
    if not return_sum:
        return y if out_dtype is None else y.to(out_dtype)
    assert sum_ is not None
    return (y, sum_) if out_dtype is None else (y.to(out_dtype), sum_.to(out_dtype))


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()
