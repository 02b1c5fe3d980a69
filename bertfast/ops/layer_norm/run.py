"""LayerNorm's calls of a backend: new tensors for what it writes, and what it reads made dense."""

import math
from typing import NamedTuple

import torch

from .. import dispatch
from ..dropout import Dropout
from ..registration import empty
from ..rows import as_rows


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


class Outputs(NamedTuple):
    """y = (z - mean) * rstd * weight + bias. z, mean and rstd are for the backward."""

    y: torch.Tensor
    z: torch.Tensor | None  # None: not saved, or x itself
    mean: torch.Tensor | None
    rstd: torch.Tensor | None
    copy: torch.Tensor | None = None  # y in the dtype of x, where that is the narrower one


class Wanted(NamedTuple):
    """The gradients that a backward is asked for."""

    dz: bool
    dx: torch.dtype | None  # its dtype
    params: bool
    x_bias: bool


class Gradients(NamedTuple):
    dz: torch.Tensor | None
    dx: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None
    dx_bias: torch.Tensor | None


def forward(
    x: torch.Tensor,
    norm: Norm,
    x_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dropout: Dropout,
    backend: str,
    save: bool,
    copy: bool = False,
) -> Outputs:
    """save: what the backward reads is wanted. copy: so is y in the dtype of x."""
    weight, bias, eps = norm
    if not (weight.is_contiguous() and bias.is_contiguous()):
        norm = Norm(weight.contiguous(), bias.contiguous(), eps)
    with_z = save and saves_z(x, weight, residual, x_bias, dropout.threshold)
    outs = new_outputs(x, weight, save, with_z)
    if copy:
        outs = outs._replace(copy=empty(x))
    if x.numel():
        dispatch.backend_module("layer_norm", backend).forward(
            as_rows(x),
            as_rows(residual),
            x_bias if x_bias is None else x_bias.contiguous(),
            norm,
            dropout,
            outs,
        )
    return outs


def backward(
    dy: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout: Dropout,
    wanted: Wanted,
    backend: str,
) -> Gradients:
    grads = new_gradients(dy, weight, wanted)
    if dy.numel():
        dispatch.backend_module("layer_norm", backend).backward(
            as_rows(dy), as_rows(z), mean, rstd, weight.contiguous(), dropout, grads
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


def new_outputs(x: torch.Tensor, weight: torch.Tensor, save: bool, with_z: bool) -> Outputs:
    y = empty(x, weight.dtype)
    if not save:
        return Outputs(y, None, None, None)
    rows = math.prod(x.shape[:-1])
    z = empty(x, weight.dtype) if with_z else None
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    return Outputs(y, z, mean, rstd)


def new_gradients(dy: torch.Tensor, weight: torch.Tensor, wanted: Wanted) -> Gradients:
    return Gradients(
        empty(dy, weight.dtype) if wanted.dz else None,
        None if wanted.dx is None else empty(dy, wanted.dx),
        empty(weight) if wanted.params else None,
        empty(weight) if wanted.params else None,
        empty(weight) if wanted.x_bias else None,
    )
