"""Rotary positions, a window and a bias by distance, written out for attention's rounding model.

Everything works on padded tensors, (batch, heads, length, head_dim), and on whole matrices of
scores, (..., length, length).
"""

import torch
from torch import Tensor


def tables(length: int, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotary positions' cosines and sines, float32 (length, head_dim / 2)."""
    rates = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length)[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def rotated(x: Tensor, rotary: tuple[Tensor, Tensor] | None, back: bool = False) -> Tensor:
    """x rotated by its positions, or back."""
    if rotary is None:
        return x
    cos, sin = (table[: x.shape[-2]].to(x.dtype) for table in rotary)
    first, second = x.chunk(2, -1)
    sin = -sin if back else sin
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def sizes_back(sizes: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """The sizes of what cancels in `rotated`, of the sizes of what is rotated."""
    if rotary is None:
        return sizes
    cos, sin = (table[: sizes.shape[-2]].to(sizes.dtype).abs() for table in rotary)
    first, second = sizes.chunk(2, -1)
    return torch.cat((first * cos + second * sin, second * cos + first * sin), -1)


def _distance(length: int) -> Tensor:
    """key - query."""
    position = torch.arange(length)
    return position - position[:, None]


def in_window(length: int, window: tuple[int, int] | None) -> Tensor:
    if window is None:
        return torch.ones(length, length, dtype=torch.bool)
    return (_distance(length) >= -window[0]) & (_distance(length) <= window[1])


def _index(length: int, width: int) -> Tensor:
    reach = width // 2
    return _distance(length).clamp(-reach, reach) + reach


def bias_of(bias: Tensor | None, length: int, dtype: torch.dtype) -> Tensor | float:
    """(heads, length, length), or nothing to add."""
    return 0.0 if bias is None else bias.to(dtype)[:, _index(length, bias.shape[1])]


def by_distance(values: Tensor, bias: Tensor) -> Tensor:
    """Sums of (batch, heads, length, length) over the batch and each distance, rounded once."""
    index = _index(values.shape[-1], bias.shape[1]).flatten()
    sums = torch.zeros(bias.shape, dtype=torch.float64)
    sums.index_add_(1, index, values.double().sum(0).flatten(1))
    return sums.to(values.dtype)
