"""bias_gelu by csrc/kernels/bias_gelu.cu, on a GPU or compiled for the host."""

import torch

from .. import native
from ..native import DTYPE_TAG
from ..pointers import pointer, row_pointer

# A thread of the backward adds at most this many rows in one float32 chain before the compensated
# final sum: what that rounds is within the error budget, whatever the number of rows.
LONGEST_CHAIN = 32
# Threads that keep a multiprocessor busy: each has 64 bytes of loads under way.
THREADS_PER_MULTIPROCESSOR = 1024
# A row, where there is no bias and no gap, so that the shape says nothing: what a block takes.
FLAT_BYTES = 256 * 16


def unsupported_reason(device_type, dtype=None) -> str | None:
    reason = native.unsupported_reason(device_type)
    if reason is None and dtype is not None and dtype not in DTYPE_TAG:
        reason = f"x must be float32, float16 or bfloat16, got {dtype}"
    return reason


def _pieces(x, bias, wide, *others) -> list[tuple[int, int, int]]:
    """The (rows, width, first element) of each launch. wide has the output's dtype."""
    if bias is not None or not all(tensor.is_contiguous() for tensor in (x, *others)):
        width = x.shape[-1]
        return [(x.numel() // width, width, 0)]
    width = FLAT_BYTES // wide.element_size()
    rows, rest = divmod(x.numel(), width)
    pieces = [(rows, width, 0)] if rows else []
    return [*pieces, (1, rest, rows * width)] if rest else pieces


def _at(rows: torch.Tensor, width: int, first: int) -> tuple[int, int]:
    """Where a piece begins, and its row stride."""
    address, stride = row_pointer(rows, width)
    return address + first * rows.element_size(), stride


def forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool, y: torch.Tensor) -> None:
    """Fills y. x is rows."""
    module = native.module_for(x)
    place = native.place(x)
    for rows, width, first in _pieces(x, bias, y):
        x_pointer, x_stride = _at(x, width, first)
        module.bias_gelu_forward(
            x_pointer,
            pointer(bias),
            pointer(y) + first * y.element_size(),
            rows,
            x_stride,
            width,
            tanh,
            DTYPE_TAG[x.dtype],
            DTYPE_TAG[y.dtype],
            *place,
        )


def _chains(dy: torch.Tensor, rows: int, width: int) -> int:
    """How many threads walk down the rows side by side: what fills the GPU, two rows at a time;
    more where their chains would grow long."""
    vectors = -(-width * dy.element_size() // 16)
    filling = THREADS_PER_MULTIPROCESSOR * native.multiprocessors(dy) // vectors
    return max(min(filling, -(-rows // 2)), -(-rows // LONGEST_CHAIN))


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    dx: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """Fills dx and dbias where they are given. dy and x are rows."""
    module = native.module_for(dy)
    place = native.place(dy)
    tag = DTYPE_TAG[dy.dtype]
    partial = None
    if dx is None:  # the kernel writes it anyway
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows, width, first in _pieces(x, bias, dy, dy):
        chains = _chains(dy, rows, width)
        if dbias is not None:  # then there is one piece
            partial = torch.empty((chains, width), dtype=torch.float32, device=dy.device)
        dy_pointer, dy_stride = _at(dy, width, first)
        x_pointer, x_stride = _at(x, width, first)
        module.bias_gelu_backward(
            dy_pointer,
            x_pointer,
            pointer(bias),
            pointer(dx) + first * dx.element_size(),
            pointer(partial),
            rows,
            dy_stride,
            x_stride,
            width,
            chains,
            tanh,
            DTYPE_TAG[x.dtype],
            tag,
            *place,
        )
    if partial is not None:
        sums = (pointer(partial), pointer(dbias), 0, 0)
        module.column_sum(*sums, 1, chains, width, tag, *place)
