"""y = gelu(v), v = x + bias; dx = dy * gelu'(v), dbias = sum of dx over rows.

Saved for the backward: x and bias, nothing else. With z = min(|v|, LIMIT):
    exact   y = max(v, 0) - z * exp2(p(z))          gelu'(-z) = exp2(-z^2 log2(e) / 2) * m(z)
    tanh    y = max(v, 0) - z * s,  s = w / (1 + w),  w = exp2(-2 log2(e) u(z))
                                                    gelu'(-z) = s - s / (1 + w) * z * 2 u'(z)
with the polynomials p and m of fit.py, and u(z) = sqrt(2 / pi) * (z + 0.044715 z^3). For v > 0
gelu'(v) = 1 - gelu'(-v). At LIMIT exp2 gives 0 and z stays finite, so that an infinite v gives the
limits: y = Inf and 0, gelu' = 1 and 0. A NaN stays one.

A program takes a tile of rows by columns; a thread's columns are the same in each row of the tile,
so it loads their biases once. Without bias and with contiguous tensors the tensor is one row.
Forward moves 2 values an element (x; y). Backward 3 (x, dy; dx): a program walks down its rows,
sums the columns in registers and writes one float32 row of partial sums, which a finalising kernel
adds in a fixed order. No atomics: the same bits each run.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import triton_lib
from ..pointers import dense, row_stride
from ..triton_column_sum import column_sums
from ..triton_launch import Launch
from ..triton_lib import reciprocal, round_to, to_float
from . import coefficients, limits

_LIMIT = tl.constexpr(coefficients.LIMIT)
_LOG2_E = tl.constexpr(1.4426950408889634)
_TANH_1 = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_TANH_3 = tl.constexpr(0.044715)
_FORWARD_16 = tl.constexpr(coefficients.FORWARD_16)
_FORWARD_32 = tl.constexpr(coefficients.FORWARD_32)
_BACKWARD_16 = tl.constexpr(coefficients.BACKWARD_16)
_BACKWARD_32 = tl.constexpr(coefficients.BACKWARD_32)


@triton.jit
def polynomial(z, C: tl.constexpr, DEGREE: tl.constexpr):
    """C[0] + C[1] z + ... + C[DEGREE] z^DEGREE, a fused multiply-add each."""
    value = z * C[DEGREE] + C[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        value = value * z + C[DEGREE - i]
    return value


@triton.jit
def sigmoids(z):
    """1 / (1 + e^(2 u)) and 1 / (1 + e^(-2 u)), u = u(z) of the tanh form, at z >= 0."""
    w = tl.exp2(z * (z * z * (-2.0 * _LOG2_E * _TANH_1 * _TANH_3) - 2.0 * _LOG2_E * _TANH_1))
    above = reciprocal(1.0 + w)
    return w * above, above


@triton.jit
def tanh_slope(z, share, above):
    """The tanh form's derivative at -z, of what `sigmoids` gives."""
    slope = z * z * (6.0 * _TANH_1 * _TANH_3) + 2.0 * _TANH_1  # 2 u'(z)
    return share - share * above * (z * slope)


@triton.jit
def gelu(v, TANH: tl.constexpr, WIDE: tl.constexpr):
    """WIDE: to float32's precision, not only to that of a 16-bit result."""
    z = tl.minimum(tl.abs(v), _LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if TANH:
        share, _ = sigmoids(z)
    elif WIDE:
        share = tl.exp2(polynomial(z, _FORWARD_32, 8))
    else:
        share = tl.exp2(polynomial(z, _FORWARD_16, 6))
    return tl.maximum(v, 0.0) - z * share


@triton.jit
def gelu_derivative(v, TANH: tl.constexpr, WIDE: tl.constexpr):
    z = tl.minimum(tl.abs(v), _LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if TANH:
        share, above = sigmoids(z)
        below = tanh_slope(z, share, above)
    else:
        bell = tl.exp2(z * z * (-0.5 * _LOG2_E))
        if WIDE:
            below = bell * polynomial(z, _BACKWARD_32, 12)
        else:
            below = bell * polynomial(z, _BACKWARD_16, 8)
    return tl.where(v > 0, 1.0 - below, below)


@triton.jit(do_not_specialize=["n_rows", "column_tiles"])
def bias_gelu_fwd_kernel(
    x_ptr,  # rows of `width`
    bias_ptr,  # width, or None
    y_ptr,  # rows of `width`
    width,
    x_row_stride,
    n_rows,
    column_tiles,  # of BLOCK_N columns, in a row
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    # 1. the tile; neighbouring programs have neighbouring columns
    program = tl.program_id(0)
    first_col = program % column_tiles * BLOCK_N
    first_row = (program // column_tiles).to(tl.int64) * ROWS
    cols = tl.max_contiguous(tl.arange(0, BLOCK_N), GROUP)
    rows = tl.arange(0, ROWS)[:, None].to(tl.int64)
    inside_cols = cols < width - first_col  # first_col + cols might not fit into 32 bits
    inside = (first_row + rows < n_rows) & inside_cols[None, :]

    # 2. v = x + bias
    x = x_ptr + first_row * x_row_stride + first_col + rows * x_row_stride + cols[None, :]
    v = to_float(tl.load(x, mask=inside, other=0.0))
    if bias_ptr is not None:
        bias = to_float(tl.load(bias_ptr + first_col + cols, mask=inside_cols, other=0.0))
        v += bias[None, :]

    # 3. y
    y = gelu(v, TANH, y_ptr.dtype.element_ty == tl.float32)
    out = y_ptr + first_row * width + first_col + rows * width + cols[None, :]
    tl.store(out, round_to(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "column_tiles"])
def bias_gelu_bwd_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,  # None: not wanted
    dbias_ptr,  # partial sums, (row tiles, width) float32; None: not wanted
    width,
    dy_row_stride,
    x_row_stride,
    n_rows,
    column_tiles,
    TANH: tl.constexpr,
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
    rows = tl.arange(0, ROWS)[:, None]
    inside_cols = cols < width - first_col  # first_col + cols might not fit into 32 bits
    if bias_ptr is not None:
        bias = to_float(tl.load(bias_ptr + first_col + cols, mask=inside_cols, other=0.0))
    if dbias_ptr is not None:
        dbias = tl.zeros((ROWS, BLOCK_N), tl.float32)
    far_rows, tile_rows = rows.to(tl.int64), tl.full((), ROWS, tl.int64)
    dy_at = (
        dy_ptr + first_row * dy_row_stride + first_col + far_rows * dy_row_stride + cols[None, :]
    )
    x_at = x_ptr + first_row * x_row_stride + first_col + far_rows * x_row_stride + cols[None, :]
    if dx_ptr is not None:
        dx_at = dx_ptr + first_row * width + first_col + far_rows * width + cols[None, :]

    for step in range(STEPS):
        # 2. dy and v = x + bias
        inside = (step * ROWS + rows < rows_left) & inside_cols[None, :]
        dy = to_float(tl.load(dy_at, mask=inside, other=0.0))
        v = to_float(tl.load(x_at, mask=inside, other=0.0))
        if bias_ptr is not None:
            v += bias[None, :]

        # 3. dx, and its share of the bias's gradient
        dx = dy * gelu_derivative(v, TANH, dy_ptr.dtype.element_ty == tl.float32)
        if dx_ptr is not None:
            tl.store(dx_at, round_to(dx, dx_ptr.dtype.element_ty), mask=inside)
            dx_at += tile_rows * width
        if dbias_ptr is not None:
            dbias += dx  # 0 where nothing was loaded
        dy_at += tile_rows * dy_row_stride
        x_at += tile_rows * x_row_stride

    # 4. one row of partial sums
    if dbias_ptr is not None:
        out = dbias_ptr + row_tile * width + first_col + cols
        tl.store(out, tl.sum(dbias, axis=0), mask=inside_cols)


_forward = Launch(bias_gelu_fwd_kernel)
_backward = Launch(bias_gelu_bwd_kernel)


@dataclass(frozen=True)
class Config:
    """How rows and columns are split."""

    rows: int  # of a tile
    block_n: int
    group: int  # neighbouring columns of a thread: 16 bytes
    num_warps: int = 4
    steps: int = 1  # a program's tiles, one below the other; backward only


@functools.lru_cache(256)
def block_of(width: int, most: int) -> int:
    """The widest block that the width fills, or if it is narrow the one that it nearly does."""
    for block in (1024, 512, 256):
        if block <= most and width % block == 0:
            return block
    return min(most, max(16, triton.next_power_of_2(width)))


def forward_config(width: int, itemsize: int, flat: bool) -> Config:
    """flat: all is one row. A batch that has one row only is served as others are, so that nothing
    is compiled for it."""
    group = 16 // itemsize
    tile = 128 * 4 * group  # four times 16 bytes a thread
    block = tile if flat and width >= tile else block_of(width, 1024)
    return Config(1 if flat else tile // block, block, group)


# A sum of a tile's rows may be one float32 chain: as long as this it is within the error budget.
LONGEST_CHAIN = 32


def backward_config(width: int, itemsize: int, rows: int, flat: bool = False) -> Config:
    group = 16 // itemsize
    if flat and width >= 128 * 16:
        return Config(1, 128 * 16, group)
    # Twice 16 bytes a thread, of x and of dy: with more the sums and biases don't fit beside them.
    return walk_config(width, rows, 128 * 2 * group, group)


def walk_config(width: int, rows: int, tile: int, group: int) -> Config:
    """Of programs that walk down tiles of so many values, and write a row of partial sums each."""
    block = block_of(width, 1024)
    tile_rows = min(LONGEST_CHAIN, max(1, tile // block))
    # Walking down 16 tiles makes the partial sums a 20th of the traffic or less, with a chain of 16
    # additions; where that leaves few programs, 4.
    programs = -(-rows // (tile_rows * 16)) * -(-width // block)
    return Config(tile_rows, block, group, steps=16 if programs >= 512 else 4)


def unsupported_reason(device: str | torch.device, dtype: torch.dtype | None = None) -> str | None:
    return triton_lib.unsupported_reason(device) or limits.unsupported_reason(dtype)


def _shape(x: torch.Tensor, bias: torch.Tensor | None, *others: torch.Tensor) -> tuple[int, int]:
    """Rows and width; the tensor as one row where there is no bias and no gap between rows."""
    width = x.shape[-1] if x.dim() else 1
    if bias is None and all(tensor.is_contiguous() for tensor in (x, *others)):
        return 1, x.numel()
    return x.numel() // width, width


# What is one row is done in several launches beyond this: columns are numbered in 32 bits.
LONGEST_ROW = 2**30


def forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool, y: torch.Tensor) -> None:
    """Fills y. x is rows."""
    rows, width = _shape(x, bias)
    if rows == 1 and width > LONGEST_ROW and bias is None:
        for part, out in zip(*(t.view(-1).split(LONGEST_ROW) for t in (x, y)), strict=True):
            forward(part, None, tanh, out)
        return
    config = forward_config(width, y.element_size(), bias is None and rows == 1)
    column_tiles = -(-width // config.block_n)
    with triton_lib.on_device(x):
        _forward(
            (-(-rows // config.rows) * column_tiles,),
            (x, dense(bias), dense(y)),
            (width, row_stride(x, width)),
            (rows, column_tiles),
            (tanh, config.rows, config.block_n, config.group),
            config.num_warps,
        )


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    dx: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """Fills dx and dbias where they are given. dy and x are rows."""
    rows, width = _shape(x, bias, dy)
    if rows == 1 and width > LONGEST_ROW and bias is None and dx is not None:
        for part, of_x, out in zip(
            *(t.view(-1).split(LONGEST_ROW) for t in (dy, x, dx)), strict=True
        ):
            backward(part, of_x, None, tanh, out, None)
        return
    config = backward_config(width, dy.element_size(), rows, bias is None and rows == 1)
    row_tiles = -(-rows // (config.rows * config.steps))
    column_tiles = -(-width // config.block_n)
    partial = None
    if dbias is not None:
        partial = torch.empty((1, row_tiles, width), dtype=torch.float32, device=dy.device)
    with triton_lib.on_device(dy):
        _backward(
            (row_tiles * column_tiles,),
            (dy, x, dense(bias), dense(dx), partial),
            (width, row_stride(dy, width), row_stride(x, width)),
            (rows, column_tiles),
            (tanh, config.rows, config.steps, config.block_n, config.group),
            config.num_warps,
        )
        if dbias is not None and partial is not None:
            column_sums(partial, [dbias])
