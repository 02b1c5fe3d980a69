"""gated's calls of a backend: new tensors for what it writes, and what it reads made dense."""

import torch

from .. import dispatch
from ..registration import empty
from ..rows import as_rows


def forward(
    x: torch.Tensor, bias: torch.Tensor | None, activation: str, second: bool, backend: str
) -> torch.Tensor:
    y = new_output(x)
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        module = dispatch.backend_module("gated", backend)
        module.forward(as_rows(x), bias, activation, second, y)
    return y


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    second: bool,
    want_dbias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx and dbias, or None for what isn't wanted. The kernels write dx in any case."""
    dx, dbias = new_gradients(x, bias, want_dbias)
    if dy.numel():
        bias = None if bias is None else bias.contiguous()
        module = dispatch.backend_module("gated", backend)
        module.backward(as_rows(dy), as_rows(x), bias, activation, second, dx, dbias)
    elif dbias is not None:
        dbias.zero_()
    return dx, dbias


def new_output(x: torch.Tensor) -> torch.Tensor:
    *lead, wide = x.shape
    return torch.empty(*lead, wide // 2, dtype=x.dtype, device=x.device)


def new_gradients(
    x: torch.Tensor, bias: torch.Tensor | None, want_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return empty(x), empty(bias) if want_dbias and bias is not None else None
