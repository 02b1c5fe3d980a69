"""bias_gelu's calls of a backend: new tensors for what it writes, and what it reads made dense."""

import torch

from .. import dispatch
from ..registration import empty
from ..rows import as_rows


def forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool, backend: str) -> torch.Tensor:
    y = empty(x, x.dtype if bias is None else bias.dtype)
    if x.numel():
        bias = None if bias is None else bias.contiguous()
        dispatch.backend_module("bias_gelu", backend).forward(as_rows(x), bias, tanh, y)
    return y


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    want_dx: bool,
    want_dbias: bool,
    backend: str,
    *,
    in_place: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dx and dbias, or None for what isn't wanted. in_place: dx takes the memory of dy, which is
    dense and has its dtype; each value is read by the thread that writes there, before it does."""
    dx, dbias = new_gradients(x, bias, want_dx and not in_place, want_dbias)
    if want_dx and in_place:
        dx = dy
    if dy.numel():
        bias = None if bias is None else bias.contiguous()
        module = dispatch.backend_module("bias_gelu", backend)
        module.backward(as_rows(dy), as_rows(x), bias, tanh, dx, dbias)
    elif dbias is not None:
        dbias.zero_()
    return dx, dbias


def new_gradients(
    x: torch.Tensor, bias: torch.Tensor | None, want_dx: bool, want_dbias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    dx = empty(x) if want_dx else None
    return dx, empty(bias) if want_dbias and bias is not None else None
