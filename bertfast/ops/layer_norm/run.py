"""LayerNorm's calls of a backend: new tensors for what it writes, and what it reads made dense."""

import math
from typing import NamedTuple

import torch

from .. import dispatch
from ..dropout import Dropout
from ..registration import empty
from ..rows import as_rows


class Norm(NamedTuple):
    """LayerNorm; or RMSNorm, whose mean is 0 and which has no bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool = False


class Kept(NamedTuple):
    """The outputs of a forward besides y."""

    saved: bool  # what the backward reads
    sum: bool = False  # z, also where that is x
    copy: bool = False  # y in the dtype of x


class Outputs(NamedTuple):
    """y = (z - mean) * rstd * weight + bias. z, mean and rstd are for the backward; z is the sum as
    well, where that is asked for."""

    y: torch.Tensor
    z: torch.Tensor | None  # None: not wanted, or x itself
    mean: torch.Tensor | None  # None of RMSNorm
    rstd: torch.Tensor | None
    copy: torch.Tensor | None = None  # y in the dtype of x, where that is the narrower one


class Saved(NamedTuple):
    """A forward's values for its backward. Without a mean they are RMSNorm's."""

    z: torch.Tensor | None
    mean: torch.Tensor | None
    rstd: torch.Tensor | None


NOTHING_SAVED = Saved(None, None, None)  # of a sum alone


class Wanted(NamedTuple):
    """The gradients that a backward is asked for."""

    dz: bool
    dx: torch.dtype | None  # its dtype
    params: bool
    x_bias: bool
    bias: bool = True  # the norm has one, so that params are two


class Gradients(NamedTuple):
    dz: torch.Tensor | None
    dx: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None
    dx_bias: torch.Tensor | None


def forward(
    x: torch.Tensor,
    norm: Norm | None,
    x_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dropout: Dropout,
    backend: str,
    kept: Kept,
) -> Outputs:
    """norm: None for the sum alone, which is then y, in the dtype of residual."""
    weight = norm.weight if norm is not None else residual
    assert weight is not None
    if norm is not None and not (
        norm.weight.is_contiguous() and (norm.bias is None or norm.bias.is_contiguous())
    ):
        norm = norm._replace(weight=norm.weight.contiguous(), bias=_contiguous(norm.bias))
    with_z = kept.sum or (kept.saved and saves_z(x, weight, residual, x_bias, dropout.threshold))
    outs = new_outputs(x, weight.dtype, norm, kept, with_z)
    if x.numel():
        dispatch.backend_module("layer_norm", backend).forward(
            as_rows(x), as_rows(residual), _contiguous(x_bias), norm, dropout, outs
        )
    return outs


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    saved: Saved,
    weight: torch.Tensor | None,
    dropout: Dropout,
    wanted: Wanted,
    backend: str,
) -> Gradients:
    """dsum: the gradient of the sum, where that was returned. weight: None of a sum alone, whose
    gradient is dy."""
    grads = new_gradients(dy, weight, wanted)
    if dy.numel():
        dispatch.backend_module("layer_norm", backend).backward(
            *(as_rows(dy), as_rows(dsum), saved._replace(z=as_rows(saved.z))),
            *(_contiguous(weight), dropout, grads),
        )
    else:
        for sum_ in grads[2:]:
            if sum_ is not None:
                sum_.zero_()
    return grads


def saves_z(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    threshold: int,
) -> bool:
    """True if z differs from x, in value or in dtype."""
    same = residual is None and x_bias is None and threshold == 0
    return not same or x.dtype != weight.dtype


def new_outputs(
    x: torch.Tensor, dtype: torch.dtype, norm: Norm | None, kept: Kept, with_z: bool
) -> Outputs:
    z = empty(x, dtype) if with_z else None
    mean = rstd = None
    if kept.saved and norm is not None:
        rows = math.prod(x.shape[:-1])
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        mean = None if norm.rms else torch.empty_like(rstd)
    return Outputs(empty(x, dtype), z, mean, rstd, empty(x) if kept.copy else None)


def new_gradients(dy: torch.Tensor, weight: torch.Tensor | None, wanted: Wanted) -> Gradients:
    dtype, columns = dy.dtype, dy.shape[-1:]

    def of_columns(is_wanted: bool) -> torch.Tensor | None:
        return torch.empty(columns, dtype=dtype, device=dy.device) if is_wanted else None

    return Gradients(
        empty(dy) if wanted.dz else None,
        None if wanted.dx is None else empty(dy, wanted.dx),
        of_columns(wanted.params),
        of_columns(wanted.params and wanted.bias),
        of_columns(wanted.x_bias),
    )
