"""Between linear_cross_entropy's products: losses of rows of logits, and the logits' gradients.

    v = z + bias,  lse = log sum exp v                          for each row, over the vocabulary
    loss = lse - (1 - s) v[label] - s mean(v)                   s: label smoothing
    dz = scale (exp(v - lse) - (1 - s) onehot(label) - s / V),  dbias = sum of dz over rows

z is a product in float32, of rows as far apart as the vocabulary rounded up to a multiple of 16: so
rows are read and written by 16 bytes whatever the vocabulary, which for 30,522 words would be by 4.
Memory behind a row's end is read, is finite and counts for nothing; dz is 0 there.

Two kernels. The first reads a row and leaves its loss and lse: each of a tile's columns has a
largest value and a sum of its own, by one exponential a logit, and they are put together at the
end. The second makes dz by tiles of rows and columns, with sums of the columns as bias_gelu has
them: a partial sum for each tile's rows, which a finalising kernel adds in a fixed order. No
atomics: the same bits each run. Without gradients the first is all.

Bytes of a logit, of 16-bit operands: its product writes it (4), both kernels read it (8), dz is
written (2) and read by two products (4), and partial sums take 0.25: 18. One kernel for both might
find its row in the second-level cache, which saves 4, but would read dz again for the sums of its
columns, of rounded values. Composed of torch's functions (reference_rows.py) it is 58: the product
(4), bias (8), largest value (4), difference (8), exponential (8), its sum (4), scaling (8), sums of
columns (4), rounding (6), products (4).
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import triton_lib
from ..pointers import dense
from ..triton_column_sum import column_sums
from ..triton_launch import Launch
from ..triton_lib import round_to, to_float
from . import limits

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e38)  # of a logit; times log2(e) it is finite


@triton.jit
def add_exponentials(v, most, total):
    """most, the largest so far, and total, the sum of exp(. - most), after another value each."""
    above = v - most
    e = tl.exp2(-tl.abs(above) * _LOG2_E)
    # The larger of the two has exp(0). A NaN isn't larger than anything, and goes into the sum.
    return tl.maximum(most, v), tl.where(above > 0, total * e + 1.0, total + e)


@triton.jit(do_not_specialize=["vocabulary"])
def cross_entropy_loss_kernel(
    z_ptr,  # rows of logits
    bias_ptr,  # z_row_stride of them, or None
    label_ptr,  # int64; below 0: the row doesn't count
    loss_ptr,
    lse_ptr,
    z_row_stride,
    smoothing: tl.float32,
    vocabulary,
    SMOOTHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    if label < 0:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        return
    z = z_ptr + row * z_row_stride
    own = tl.load(z + label)
    if bias_ptr is not None:
        own += to_float(tl.load(bias_ptr + label))
    cols = tl.arange(0, BLOCK_N)
    most = tl.full((BLOCK_N,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)

    # 1. whole tiles
    whole = vocabulary // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        v = tl.load(z + first + cols)
        if bias_ptr is not None:
            v += to_float(tl.load(bias_ptr + first + cols))
        if SMOOTHED:
            sums += v
        most, total = add_exponentials(v, most, total)

    # 2. the rest; what is behind the vocabulary vanishes beside any logit
    inside = cols < vocabulary - whole
    there = cols < z_row_stride - whole
    v = tl.load(z + whole + cols, mask=there, other=0.0)
    if bias_ptr is not None:
        v += to_float(tl.load(bias_ptr + whole + cols, mask=there, other=0.0))
    if SMOOTHED:
        sums += tl.where(inside, v, 0.0)
    most, total = add_exponentials(tl.where(inside, v, _LOWEST), most, total)

    # 3. lse and the loss
    top = tl.max(most, axis=0)
    log = tl.log(tl.sum(total * tl.exp2((most - top) * _LOG2_E), axis=0))
    loss = (top - own) + log
    if SMOOTHED:
        loss += smoothing * (own - tl.sum(sums, axis=0) / vocabulary)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, top + log)


@triton.jit(do_not_specialize=["vocabulary", "n_rows", "column_tiles"])
def cross_entropy_dz_kernel(
    z_ptr,
    bias_ptr,
    label_ptr,
    lse_ptr,
    scale_ptr,  # one a row; None: 1
    dz_ptr,  # may be z, whose values are read by the thread that writes there
    dbias_ptr,  # partial sums, (row tiles, z_row_stride) float32; None: not wanted
    z_row_stride,  # dz's too
    own: tl.float32,  # 1 - s
    every: tl.float32,  # s / V
    vocabulary,
    n_rows,
    column_tiles,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,  # a program takes ROWS rows STEPS times
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    # 1. the tile, and its columns' biases
    program = tl.program_id(0)
    first_col = program % column_tiles * BLOCK_N
    row_tile = (program // column_tiles).to(tl.int64)
    first_row = row_tile * (STEPS * ROWS)
    rows_left = tl.minimum(n_rows - first_row, STEPS * ROWS).to(tl.int32)
    cols = tl.max_contiguous(tl.arange(0, BLOCK_N), GROUP)
    rows = tl.arange(0, ROWS)
    there = (cols < z_row_stride - first_col)[None, :]
    inside = (cols < vocabulary - first_col)[None, :]
    if bias_ptr is not None:
        bias = to_float(tl.load(bias_ptr + first_col + cols[None, :], mask=there, other=0.0))
    if dbias_ptr is not None:
        dbias = tl.zeros((ROWS, BLOCK_N), tl.float32)
    tile_rows = tl.full((), ROWS, tl.int64)
    far = first_row * z_row_stride + first_col
    at = rows[:, None].to(tl.int64) * z_row_stride + cols[None, :]
    z_at, dz_at = z_ptr + far + at, dz_ptr + far + at

    for step in range(STEPS):
        # 2. what the rows have
        row = step * ROWS + rows
        label = tl.load(label_ptr + first_row + row, mask=row < rows_left, other=-1)
        counted = label >= 0
        lse = tl.load(lse_ptr + first_row + row, mask=counted, other=0.0)
        scale = tl.where(counted, 1.0, 0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + first_row + row, mask=counted, other=0.0)

        # 3. dz, and its share of the bias's gradient
        v = tl.load(z_at, mask=counted[:, None] & there, other=0.0)
        if bias_ptr is not None:
            v += bias
        dz = tl.exp2((v - lse[:, None]) * _LOG2_E) - every
        of_label = cols[None, :] == label.to(tl.int32)[:, None] - first_col
        dz = tl.where(of_label, dz - own, dz) * scale[:, None]
        dz = tl.where(counted[:, None] & inside, dz, 0.0)
        rounded = round_to(dz, dz_ptr.dtype.element_ty)
        tl.store(dz_at, rounded, mask=(row < rows_left)[:, None] & there)
        if dbias_ptr is not None:
            dbias += dz
        z_at += tile_rows * z_row_stride
        dz_at += tile_rows * z_row_stride

    # 4. one row of partial sums
    if dbias_ptr is not None:
        out = dbias_ptr + row_tile * z_row_stride + first_col + cols
        tl.store(out, tl.sum(dbias, axis=0), mask=cols < z_row_stride - first_col)


_loss = Launch(cross_entropy_loss_kernel)
_dz = Launch(cross_entropy_dz_kernel)

MULTIPLE = limits.MULTIPLE
LOSS_BLOCK = 1024
DZ_TILE = 2048  # values
DZ_BLOCK = 1024
# Neighbouring columns of a thread: 16 bytes of z, and 8 of a dz in 16 bits. With twice as many
# either is laid out anew in shared memory, between barriers.
GROUP = 4
NUM_WARPS = 4
LONGEST_CHAIN = 32  # of float32 additions, which is within the error budget


@dataclass(frozen=True)
class Config:
    """How a chunk is split into tiles for dz."""

    rows: int
    steps: int
    block_n: int


@functools.lru_cache(256)
def dz_config(wide: int, rows: int) -> Config:
    block = min(DZ_BLOCK, triton.next_power_of_2(wide))
    tile_rows = min(LONGEST_CHAIN, DZ_TILE // block)
    # As bias_gelu: 16 tiles, one below the other, or 4 where that leaves few programs.
    programs = -(-rows // (tile_rows * 16)) * -(-wide // block)
    return Config(tile_rows, 16 if programs >= 512 else 4, block)


def unsupported_reason(
    device: str | torch.device, dtype: torch.dtype | None = None, vocabulary: int | None = None
) -> str | None:
    return triton_lib.unsupported_reason(device) or limits.unsupported_reason(dtype, vocabulary)


def _room(rows: torch.Tensor) -> int:
    """From one row to the next: a row and what is behind it."""
    wide = rows.stride(0)
    if wide % MULTIPLE or wide < rows.shape[1] or (rows.stride(1) != 1 and rows.shape[1] != 1):
        raise AssertionError(
            f"a kernel reads this tensor as rows apart by a multiple of {MULTIPLE} values; "
            f"it has shape {list(rows.shape)} and strides {list(rows.stride())}"
        )
    return wide


def forward(
    z: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    smoothing: float,
    losses: torch.Tensor,
    scale: torch.Tensor | None,
    dz: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """Fills losses and dz, which may be z, and adds to dbias.

    z is rows of logits with room behind them (chunks.py), as dz is, and bias and dbias are of a
    row's length with that room. scale, of float32: a number for each row; None: 1.
    """
    rows, vocabulary = z.shape
    wide = _room(z)
    lse = torch.empty_like(losses)
    with triton_lib.on_device(z):
        _loss(
            (rows,),
            (z, dense(bias), dense(labels), dense(losses), lse),
            (wide,),
            (smoothing, vocabulary),
            (smoothing > 0, min(LOSS_BLOCK, triton.next_power_of_2(wide))),
            NUM_WARPS,
        )
        if dz is None:
            return
        if _room(dz) != wide:
            raise AssertionError(f"dz's rows must be {wide} apart, as z's are")
        config = dz_config(wide, rows)
        row_tiles = -(-rows // (config.rows * config.steps))
        column_tiles = -(-wide // config.block_n)
        partial = None
        if dbias is not None:
            # Below the sums so far are those of this chunk.
            partial = torch.empty((1, row_tiles + 1, wide), dtype=torch.float32, device=z.device)
            partial[0, 0].copy_(dbias)
        _dz(
            (row_tiles * column_tiles,),
            (
                z,
                dense(bias),
                dense(labels),
                lse,
                dense(scale),
                dz,
                None if partial is None else partial[0, 1:],
            ),
            (wide,),
            (1 - smoothing, smoothing / vocabulary, vocabulary, rows, column_tiles),
            (config.rows, config.steps, config.block_n, GROUP),
            NUM_WARPS,
        )
        if dbias is not None and partial is not None:
            column_sums(partial, [dbias])
