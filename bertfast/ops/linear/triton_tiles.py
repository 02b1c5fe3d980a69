"""Functions of the kernels of products with an activation: a tile's place, products and epilogue.

Widths and strides come in units of 8 elements, which are 16 bytes: so the compiler knows that each
access of 8 is aligned, whatever the width, and compiles one form for all.
"""

import triton
import triton.language as tl

from ..bias_gelu.triton import gelu_derivative
from ..gated.triton import activate, activate_with_slope
from ..triton_lib import INTERPRETED, to_float

_INTERPRETED = tl.constexpr(INTERPRETED)

# Rows of tiles that programs walk down before they take the next column of tiles: those that run at
# once share their operands in the second-level cache.
_GROUP = tl.constexpr(8)


@triton.jit
def tile_at(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row and the column of tiles in which a tile lies."""
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.zeros((), tl.uint32) + tile  # unsigned divisions take half the instructions
    in_group = (column_tiles * _GROUP).to(tl.uint32)
    first = (tile // in_group).to(tl.int32) * _GROUP
    size = tl.minimum(row_tiles - first, _GROUP).to(tl.uint32)
    within = tile % in_group
    return first + (within % size).to(tl.int32), (within // size).to(tl.int32)


@triton.jit
def places(first_row, first_col, M, N, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets of a part's elements in dense rows of `width`, and which lie inside (M, N)."""
    rows, cols = tl.arange(0, ROWS), first_col + tl.max_contiguous(tl.arange(0, COLS), 8)
    # 128 rows of 2^24 elements fit into 32 bits.
    at = first_row.to(tl.int64) * width + (rows[:, None] * width + cols[None, :])
    return at, (rows < M - first_row)[:, None] & (cols < N)[None, :]


@triton.jit
def add_product(a, b, acc):
    if _INTERPRETED:  # where a product of bfloat16 is wrong, and nothing says so
        return tl.dot(to_float(a), to_float(b), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def part_of(acc, which: tl.constexpr, PARTS: tl.constexpr):
    """The columns of a part of a tile; equal splits of several parts become one."""
    if PARTS > 1:
        rows: tl.constexpr = acc.shape[0]
        half: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (rows, 2, half)), (0, 2, 1)))
        within: tl.constexpr = which % (PARTS // 2)
        if which < PARTS // 2:
            acc = part_of(left, within, PARTS // 2)
        else:
            acc = part_of(right, within, PARTS // 2)
    return acc


@triton.jit
def load_bias(bias_ptr, first_col, N, COLS: tl.constexpr):
    cols = first_col + tl.max_contiguous(tl.arange(0, COLS), 8)
    return to_float(tl.load(bias_ptr + cols, mask=cols < N, other=0.0))[None, :]


@triton.jit
def biased(u, bias_ptr, first_col, N):
    """u + bias of a part of a tile, in float32. u is rounded, as it is saved."""
    v = to_float(u)
    if bias_ptr is not None:
        v += load_bias(bias_ptr, first_col, N, u.shape[1])
    return v


@triton.jit
def biased_values(u, bias_ptr, first_col, N):
    """The same of a gated activation's second half, whose biases follow those of the first."""
    v = to_float(u)
    if bias_ptr is not None:
        v += load_bias(bias_ptr + N, first_col, N, u.shape[1])
    return v


@triton.jit
def activation(u, bias_ptr, first_col, N, ACTIVATION: tl.constexpr):
    """act(u + bias) of a part of a tile, in float32."""
    return activate(biased(u, bias_ptr, first_col, N), ACTIVATION, False)


@triton.jit
def gated_activation(gates, values, bias_ptr, first_col, N, ACTIVATION: tl.constexpr):
    """act(gates + bias) * (values + bias) of a part of a tile, in float32."""
    return activation(gates, bias_ptr, first_col, N, ACTIVATION) * biased_values(
        values, bias_ptr, first_col, N
    )


@triton.jit
def derivative(acc, u, bias_ptr, first_col, N, ACTIVATION: tl.constexpr):
    """acc * gelu'(u + bias) of a part of a tile, in float32."""
    v = biased(u, bias_ptr, first_col, N)
    return acc * gelu_derivative(v, ACTIVATION == "gelu_tanh", False)


@triton.jit
def gated_derivatives(acc, gates, values, bias_ptr, first_col, N, ACTIVATION: tl.constexpr):
    """acc times the derivatives of gated_activation by gates and by values."""
    a, slope = activate_with_slope(biased(gates, bias_ptr, first_col, N), ACTIVATION, False)
    return acc * biased_values(values, bias_ptr, first_col, N) * slope, acc * a


@triton.jit
def store_sums(dv, partial_ptr, row_tile, first_row, first_col, M, N, width):
    """A row tile's share of the bias's gradient, in rows of `width`. Rows outside hold the
    derivative at what was loaded for them, times the products of other rows: they count for
    nothing."""
    rows: tl.constexpr = dv.shape[0]
    cols = first_col + tl.max_contiguous(tl.arange(0, dv.shape[1]), 8)
    dv = tl.where((tl.arange(0, rows) < M - first_row)[:, None], dv, 0.0)
    at = partial_ptr + row_tile.to(tl.int64) * width + cols
    tl.store(at, tl.sum(dv, axis=0), mask=cols < N)
