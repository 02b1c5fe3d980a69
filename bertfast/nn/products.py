"""The products of a block and of its backward, for rows (tokens, width)."""

from typing import TypeVar

import torch

MaybeTensor = TypeVar("MaybeTensor", torch.Tensor, torch.Tensor | None)


def rounded(tensor: MaybeTensor, dtype: torch.dtype | None) -> MaybeTensor:
    """A product's operand in the dtype that autocast gives it; itself without autocast."""
    return tensor if tensor is None or dtype is None else tensor.to(dtype)


def rows(x: torch.Tensor, copy: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor:
    """x as (tokens, width) in the dtype that autocast gives a product's operand; its copy is that
    already."""
    if copy is not None and copy.dtype == dtype:
        x = copy
    return rounded(x.reshape(-1, x.shape[-1]), dtype)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x weight^T + bias"""
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dy^T x, in the weight's dtype."""
    return torch.mm(dy.t(), x).to(dtype)


def add_product(sum_: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """sum_ + dy weight, in the memory of sum_."""
    if sum_.dtype == dy.dtype:
        return sum_.addmm_(dy, weight)
    return sum_.add_(torch.mm(dy, weight))  # autocast: the sum in float32, the product in 16 bits


def parts(joined: torch.Tensor | None, count: int) -> tuple[torch.Tensor | None, ...]:
    """The gradients of q, k and v, of which a weight may be one or three."""
    if joined is None:
        return (None,) * count
    return joined.chunk(count) if count > 1 else (joined,)
