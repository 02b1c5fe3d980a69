"""Functions of all of attention's kernels: a tile's place, the keys that count, loads, stores.

A sequence's tokens are counted from its first: position 0. A padded batch and a packed one differ
only in where that token is, so one kernel serves both.

A tile is BLOCK positions of one sequence and one head. Its program finds it
    without a plan   by number: (batch, head, tile of the longest sequence)
    with a plan      in a list of (sequence, first position, number of sequences)
If the number of sequences is above 1 the tile holds several short ones, whole, one after the other:
they are then one "sequence" whose scores are masked between different segments.
"""

import triton
import triton.language as tl

from ..triton_lib import INTERPRETED, to_float

_INTERPRETED = tl.constexpr(INTERPRETED)

# Integers of the kernels that change from batch to batch: specialised on, each kernel would be
# compiled once more for multiples of 16.
VARYING = ["mask_batch", "lse_batch", "lse_head", "heads", "n_tiles", "length", "site", "threshold"]


@triton.jit
def find_tile(cu_ptr, tiles_ptr, heads, n_tiles, length, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """(batch, head, first position, first token, length, number of sequences) of this program.

    PARTS programs share a plan's tile, where it is larger than BLOCK. The tiles of one head of a
    sequence are neighbours, as they read the same keys and values.
    """
    program = tl.program_id(0)
    many = 1
    start = 0
    if tiles_ptr is not None:
        head = program // n_tiles
        entry = tiles_ptr + (program % n_tiles) // PARTS * 3
        batch = tl.load(entry)
        first = tl.load(entry + 1) + program % n_tiles % PARTS * BLOCK
        many = tl.load(entry + 2)
        start = tl.load(cu_ptr + batch)
        length = tl.load(cu_ptr + batch + many) - start  # many is 0 beyond the list's end
    else:
        first = (program % n_tiles) * BLOCK
        row = program // n_tiles
        head = row % heads
        batch = row // heads
        if cu_ptr is not None:
            start = tl.load(cu_ptr + batch)
            length = tl.load(cu_ptr + batch + 1) - start
    return batch, head, first, start, length, many


@triton.jit
def attended(mask_ptr, length):
    """The first attended position, one past the last, and up to where all are attended: one past
    the last, or the first where there is a gap. Zeros if none is."""
    index = tl.arange(0, 512)
    low = tl.full((512,), 0x7FFFFFFF, tl.int32)
    high = tl.zeros((512,), tl.int32)
    count = tl.zeros((512,), tl.int32)
    for first in range(0, length, 512):
        position = first + index
        on = tl.load(mask_ptr + position, mask=position < length, other=0) != 0
        low = tl.minimum(low, tl.where(on, position, 0x7FFFFFFF))
        high = tl.maximum(high, tl.where(on, position + 1, 0))
        count += on.to(tl.int32)
    end = tl.max(high, axis=0)
    start = tl.minimum(tl.min(low, axis=0), end)
    solid = tl.where(tl.sum(count, axis=0) == end - start, end, start)
    return start, end, solid


@triton.jit
def wide(value):
    """As int64, also a plain int, which is what the interpreter makes of a loop's variable."""
    return tl.zeros((), tl.int64) + value


@triton.jit
def operand(value):
    """A matrix product's operand: as it is, but the interpreter can't multiply bfloat16."""
    if _INTERPRETED:
        value = to_float(value)
    return value


@triton.jit
def _halves(value):
    """(rows, columns) as two of half the columns."""
    rows: tl.constexpr = value.shape[0]
    half: tl.constexpr = value.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(value, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b^T. Without tensor cores a thread holds whole rows of both: above 64 columns by halves, or
    the registers spill."""
    if a.dtype == tl.float32 and PRECISION == "ieee" and a.shape[1] > 64:
        a0, a1 = _halves(a)
        b0, b1 = _halves(b)
        first = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
        return tl.dot(a1, tl.trans(b1), first, input_precision=PRECISION)
    return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def load_tile(
    base, offsets, inside, columns, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr
):
    """Rows of D values; zeros outside. Without CHECK all rows are inside."""
    if D == BLOCK_D and not CHECK:
        return tl.load(base + offsets)
    mask = (columns < D)[None, :]
    if D == BLOCK_D:
        mask = inside[:, None]
    elif CHECK:
        mask = mask & inside[:, None]
    return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def store_tile(base, offsets, value, inside, columns, D: tl.constexpr, BLOCK_D: tl.constexpr):
    if D == BLOCK_D:
        tl.store(base + offsets, value, mask=inside[:, None])
    else:
        tl.store(base + offsets, value, mask=inside[:, None] & (columns < D)[None, :])


@triton.jit
def all_finite(sums):
    """1 if none of them is NaN or infinite, else 0: times zero those are NaN.

    Summed as one row: of tensor memory, Blackwell's compiler can't sum rows and then columns."""
    flat = tl.reshape(sums * 0.0, (sums.shape[0] * sums.shape[1],), can_reorder=True)
    return (tl.sum(flat, axis=0) == 0.0).to(tl.int32)


@triton.jit
def zero_unknown_to_the_compiler(tiles_ptr):
    """A zero for the positions of a tile that is done again: were both computed alike, the
    compiler would keep what the second needs in registers that the first has need of."""
    return tl.multiple_of(tl.minimum(tl.load(tiles_ptr, volatile=True), 0), 16)


@triton.jit
def segments(cu_ptr, batch, start, many, positions):
    """For each position of a tile of several sequences: the sequence, and its first position."""
    which = tl.zeros_like(positions)
    origin = tl.zeros_like(positions)
    for index in range(1, many):
        bound = tl.load(cu_ptr + batch + index) - start
        beyond = positions >= bound
        which = tl.where(beyond, index, which)
        origin = tl.where(beyond, bound, origin)
    return which, origin
