"""The largest product of each word and sequence of a chunk, and its token, by a kernel.

    top = max of z over a sequence's tokens,  token = the first that has it

z is a product in float32, (tokens, words), of rows as far apart as a multiple of 16 values, so that
they are read by 16 bytes. A program takes some neighbouring words of one sequence, ROWS tokens at a
time: each of a tile's values has a largest of its own, and they are put together at the end. NaN is
larger than anything. No atomics: the same bits each run.

Bytes of a logit: its product writes it (4), the kernel reads it (4). By torch's functions
(reference_top.py) a packed batch is gathered (8) and masked (8) besides, padding included.
"""

import torch
import triton
import triton.language as tl

from ...packing import Sequences
from .. import triton_lib
from ..pointers import dense
from ..triton_launch import Launch
from . import limits

_LARGE = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["words", "length", "column_tiles"])
def log1p_max_kernel(
    z_ptr,  # (tokens, words), rows apart
    bounds_ptr,  # int32 (sequences + 1); None: padded, all of one length
    mask_ptr,  # uint8 (sequences, length), or None
    top_ptr,  # (sequences, words), rows apart
    token_ptr,  # int32, as top
    z_row_stride,
    out_row_stride,
    words,
    length,
    column_tiles,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # 1. the sequence and its words
    program = tl.program_id(0)
    first_col = program % column_tiles * BLOCK_N
    sequence = (program // column_tiles).to(tl.int64)
    if bounds_ptr is None:
        first = sequence * length
        count = length
    else:
        first = tl.load(bounds_ptr + sequence).to(tl.int64)
        count = (tl.load(bounds_ptr + sequence + 1) - first).to(tl.int32)
    cols = tl.max_contiguous(tl.arange(0, BLOCK_N), 4)
    inside = cols < z_row_stride - first_col  # what is behind the words is read, and not written
    rows = tl.arange(0, ROWS)
    far = first * z_row_stride + first_col
    z_at = z_ptr + far + (rows[:, None].to(tl.int64) * z_row_stride + cols[None, :])
    step = tl.full((), ROWS, tl.int64) * z_row_stride

    # 2. the largest of each of the tile's places
    top = tl.full((ROWS, BLOCK_N), float("-inf"), tl.float32)
    place = tl.zeros((ROWS, BLOCK_N), tl.int32)
    for row in range(0, count, ROWS):
        there = row + rows < count
        if mask_ptr is not None:
            kept = tl.load(mask_ptr + first + row + rows, mask=there, other=0)
            there = there & (kept != 0)
        v = tl.load(z_at, mask=there[:, None] & inside[None, :], other=float("-inf"))
        larger = (v > top) | (v != v)
        top = tl.where(larger, v, top)
        place = tl.where(larger, (row + rows)[:, None], place)
        z_at += step

    # 3. of them the largest, and of equal ones the first
    wrong = top != top
    top = tl.where(wrong, float("inf"), top)
    largest = tl.max(top, axis=0)
    token = tl.min(tl.where(top == largest[None, :], place, _LARGE), axis=0)
    largest = tl.where(tl.max(wrong.to(tl.int32), axis=0) > 0, float("nan"), largest)
    inside = cols < words - first_col
    at = sequence * out_row_stride + first_col + cols
    tl.store(top_ptr + at, largest, mask=inside)
    tl.store(token_ptr + at, first.to(tl.int32) + token, mask=inside)


_largest = Launch(log1p_max_kernel)

ROWS, BLOCK_N = 16, 128
NUM_WARPS = 4


def unsupported_reason(
    device: str | torch.device, dtype: torch.dtype | None = None, vocabulary: int | None = None
) -> str | None:
    return triton_lib.unsupported_reason(device) or limits.unsupported_reason(dtype, vocabulary)


def _apart(rows: torch.Tensor, multiple: int = 1) -> int:
    """From one row to the next."""
    step = rows.stride(0)
    if step % multiple or step < rows.shape[1] or (rows.stride(1) != 1 and rows.shape[1] != 1):
        raise AssertionError(
            f"a kernel reads this tensor as rows apart by a multiple of {multiple} values; "
            f"it has shape {list(rows.shape)} and strides {list(rows.stride())}"
        )
    return step


def forward(z: torch.Tensor, sequences: Sequences, top: torch.Tensor, token: torch.Tensor) -> None:
    """Fills top and token, (sequences, words), which lie alike. z is (tokens, words)."""
    mask = sequences.key_mask
    count, words = top.shape
    length = len(z) // count  # of padded ones
    column_tiles = -(-words // BLOCK_N)
    if _apart(top) != _apart(token):
        raise AssertionError(f"token's rows must be {_apart(top)} apart, as top's are")
    with triton_lib.on_device(z):
        _largest(
            (column_tiles * count,),
            (
                z,
                dense(sequences.cu_seqlens),
                None if mask is None else dense(mask).view(torch.uint8),
                top,
                token,
            ),
            (_apart(z, limits.MULTIPLE), _apart(top)),
            (words, length, column_tiles),
            (ROWS, BLOCK_N),
            NUM_WARPS,
        )
