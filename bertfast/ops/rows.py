"""A tensor as rows, which is all that the row-wise kernels know of its shape.

No view is made of what is contiguous already: a view costs 1 us, and a call should cost ten.
"""

import torch


def as_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself if it is contiguous; else a matrix of dense rows, a copy if need be."""
    if tensor is None or tensor.is_contiguous():
        return tensor
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows, or one row, that begin at multiples of 16 bytes; a copy if need be."""
    apart = tensor.stride(0) * tensor.element_size() if tensor.ndim == 2 else 0
    if tensor.data_ptr() % 16 or apart % 16 or tensor.stride(-1) != 1 or apart < 0:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def chain(groups: int, side_by_side: int, longest: int) -> int:
    """How many groups of rows a program takes, one after the other, where `side_by_side` programs
    fill a GPU: so many that these take all rows, in as few rounds as chains of `longest` allow.

    The rows alone decide, not the GPU: a program's rows are one partial sum, and so bits.
    """
    rounds = -(-groups // (side_by_side * longest))
    return -(-groups // (side_by_side * rounds))
