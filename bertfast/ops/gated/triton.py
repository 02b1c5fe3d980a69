"""y = act(u) * v, u and v the halves of x + bias, in either order; with a = act(u) the halves of dx
are du = dy * v * act'(u) and dv = dy * a; dbias = sum of dx over rows.

Saved for the backward: x and bias, nothing else. GELU is bias_gelu's. Of it the backward wants a
and act'(u), and makes the exact slope of the value's exponential: gelu'(-z) = exp2(p(z)) - z *
phi(z), with z = min(|u|, LIMIT). SiLU, with w = exp2(-z log2(e)), r = 1 / (1 + w) and s = w r, the
sigmoids at z and -z:
    a = max(u, 0) - z * s          act'(-z) = s - s r z
For u > 0 act'(u) = 1 - act'(-u), as GELU's. No exponential is larger than 1, and what is subtracted
is at most half of what it is subtracted from, but where a slope crosses zero. At the limit exp2
gives 0 and z stays finite, so that an infinite u gives the limits. A NaN stays one.

A program takes a tile of rows by the same columns of both halves, which are read and written where
they are; a thread's columns are the same in each row of the tile, so it loads their biases once.
Forward moves 3 values an element of y (u, v; y). Backward 5 (dy, u, v; du, dv): a program walks
down its rows, with a bias sums the columns in registers and writes one float32 row of partial sums,
which a finalising kernel adds in a fixed order. No atomics: the same bits each run.
"""

import functools

import torch
import triton
import triton.language as tl

from .. import triton_lib
from ..bias_gelu import coefficients
from ..bias_gelu.triton import (
    Config,
    block_of,
    gelu,
    polynomial,
    sigmoids,
    tanh_slope,
    walk_config,
)
from ..pointers import dense, row_stride
from ..triton_column_sum import column_sums
from ..triton_launch import Launch
from ..triton_lib import reciprocal, round_to, to_float
from . import limits

_GELU_LIMIT = tl.constexpr(coefficients.LIMIT)
_SILU_LIMIT = tl.constexpr(128.0)  # e^-128 is 0 in float32
_LOG2_E = tl.constexpr(1.4426950408889634)
_BELL_PEAK = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_FORWARD_16 = tl.constexpr(coefficients.FORWARD_16)
_FORWARD_32 = tl.constexpr(coefficients.FORWARD_32)


@triton.jit
def _silu_share(u):
    """z, the sigmoid at -z, and the one at z."""
    z = tl.minimum(tl.abs(u), _SILU_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    w = tl.exp2(z * -_LOG2_E)
    above = reciprocal(1.0 + w)
    return z, w * above, above


@triton.jit
def activate(u, ACTIVATION: tl.constexpr, WIDE: tl.constexpr):
    """act(u). WIDE: to float32's precision, not only to that of a 16-bit result."""
    if ACTIVATION == "silu":
        z, share, _ = _silu_share(u)
        return tl.maximum(u, 0.0) - z * share
    return gelu(u, ACTIVATION == "gelu_tanh", WIDE)


@triton.jit
def activate_with_slope(u, ACTIVATION: tl.constexpr, WIDE: tl.constexpr):
    """act(u) and act'(u)."""
    if ACTIVATION == "silu":
        z, share, above = _silu_share(u)
        below = share - share * above * z
    else:
        z = tl.minimum(tl.abs(u), _GELU_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        if ACTIVATION == "gelu_tanh":
            share, above = sigmoids(z)
            below = tanh_slope(z, share, above)
        else:
            if WIDE:
                share = tl.exp2(polynomial(z, _FORWARD_32, 8))
            else:
                share = tl.exp2(polynomial(z, _FORWARD_16, 6))
            below = share - z * _BELL_PEAK * tl.exp2(z * z * (-0.5 * _LOG2_E))
    return tl.maximum(u, 0.0) - z * share, tl.where(u > 0, 1.0 - below, below)


@triton.jit
def _tile(program, width, column_tiles, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile's first column, its columns, and which of them there are; its number among the
    tiles below each other."""
    first_col = (program % column_tiles).to(tl.int64) * BLOCK_N
    cols = tl.max_contiguous(tl.arange(0, BLOCK_N), GROUP)
    left = tl.minimum(width - first_col, BLOCK_N).to(tl.int32)
    return first_col, cols, cols < left, (program // column_tiles).to(tl.int64)


@triton.jit(do_not_specialize=["n_rows", "column_tiles"])
def gated_fwd_kernel(
    x_ptr,  # rows of 2 * `width`
    bias_ptr,  # 2 * width, or None
    y_ptr,  # rows of `width`
    width,
    x_row_stride,
    n_rows,
    column_tiles,  # of BLOCK_N columns, in a half
    ACTIVATION: tl.constexpr,
    SECOND: tl.constexpr,  # whether the activated half is the second
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    # 1. the tile; neighbouring programs have neighbouring columns
    tile = _tile(tl.program_id(0), width, column_tiles, BLOCK_N, GROUP)
    first_col, cols, inside_cols, row_tile = tile
    first_row = row_tile * ROWS
    rows = tl.arange(0, ROWS)[:, None].to(tl.int64)
    inside = (first_row + rows < n_rows) & inside_cols[None, :]

    # 2. both halves
    x = x_ptr + first_row * x_row_stride + first_col + rows * x_row_stride + cols[None, :]
    u_at, v_at = (x + width, x) if SECOND else (x, x + width)
    u = to_float(tl.load(u_at, mask=inside, other=0.0))
    v = to_float(tl.load(v_at, mask=inside, other=0.0))
    if bias_ptr is not None:
        bias = bias_ptr + first_col + cols
        u_bias_at, v_bias_at = (bias + width, bias) if SECOND else (bias, bias + width)
        u += to_float(tl.load(u_bias_at, mask=inside_cols, other=0.0))[None, :]
        v += to_float(tl.load(v_bias_at, mask=inside_cols, other=0.0))[None, :]

    # 3. y
    y = activate(u, ACTIVATION, y_ptr.dtype.element_ty == tl.float32) * v
    out = y_ptr + first_row * width + first_col + rows * width + cols[None, :]
    tl.store(out, round_to(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "column_tiles"])
def gated_bwd_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    dbias_ptr,  # partial sums, (row tiles, 2 * width) float32; None: not wanted
    width,
    dy_row_stride,
    x_row_stride,
    n_rows,
    column_tiles,
    ACTIVATION: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,  # a program takes ROWS rows STEPS times
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    # 1. the tile, and its columns' biases
    tile = _tile(tl.program_id(0), width, column_tiles, BLOCK_N, GROUP)
    first_col, cols, inside_cols, row_tile = tile
    first_row = row_tile * (STEPS * ROWS)
    rows_left = tl.minimum(n_rows - first_row, STEPS * ROWS).to(tl.int32)
    rows = tl.arange(0, ROWS)[:, None]
    if bias_ptr is not None:
        bias = bias_ptr + first_col + cols
        u_bias_at, v_bias_at = (bias + width, bias) if SECOND else (bias, bias + width)
        u_bias = to_float(tl.load(u_bias_at, mask=inside_cols, other=0.0))[None, :]
        v_bias = to_float(tl.load(v_bias_at, mask=inside_cols, other=0.0))[None, :]
    if dbias_ptr is not None:
        du_sum = tl.zeros((ROWS, BLOCK_N), tl.float32)
        dv_sum = tl.zeros((ROWS, BLOCK_N), tl.float32)
    far_rows, tile_rows = rows.to(tl.int64), tl.full((), ROWS, tl.int64)
    wide = tl.full((), 2, tl.int64) * width
    columns = cols[None, :]
    dy_at = dy_ptr + first_row * dy_row_stride + first_col + far_rows * dy_row_stride + columns
    x_at = x_ptr + first_row * x_row_stride + first_col + far_rows * x_row_stride + columns
    dx_at = dx_ptr + first_row * wide + first_col + far_rows * wide + columns

    for step in range(STEPS):
        # 2. dy and both halves
        inside = (step * ROWS + rows < rows_left) & inside_cols[None, :]
        dy = to_float(tl.load(dy_at, mask=inside, other=0.0))
        u_at, v_at = (x_at + width, x_at) if SECOND else (x_at, x_at + width)
        u = to_float(tl.load(u_at, mask=inside, other=0.0))
        v = to_float(tl.load(v_at, mask=inside, other=0.0))
        if bias_ptr is not None:
            u += u_bias
            v += v_bias

        # 3. both halves of dx, and their shares of the bias's gradient, 0 where nothing was loaded
        a, slope = activate_with_slope(u, ACTIVATION, dy_ptr.dtype.element_ty == tl.float32)
        du, dv = dy * v * slope, dy * a
        du_at, dv_at = (dx_at + width, dx_at) if SECOND else (dx_at, dx_at + width)
        tl.store(du_at, round_to(du, dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_at, round_to(dv, dx_ptr.dtype.element_ty), mask=inside)
        if dbias_ptr is not None:
            du_sum += du
            dv_sum += dv
        dy_at += tile_rows * dy_row_stride
        x_at += tile_rows * x_row_stride
        dx_at += tile_rows * wide

    # 4. one row of partial sums
    if dbias_ptr is not None:
        out = dbias_ptr + row_tile * wide + first_col + cols
        u_out, v_out = (out + width, out) if SECOND else (out, out + width)
        tl.store(u_out, tl.sum(du_sum, axis=0), mask=inside_cols)
        tl.store(v_out, tl.sum(dv_sum, axis=0), mask=inside_cols)


_forward = Launch(gated_fwd_kernel)
_backward = Launch(gated_bwd_kernel)


@functools.lru_cache(256)
def forward_config(width: int, itemsize: int) -> Config:
    group = 16 // itemsize
    tile = 128 * 2 * group  # twice 16 bytes a thread, of each half
    block = block_of(width, 1024)
    return Config(max(1, tile // block), block, group)


@functools.lru_cache(256)
def backward_config(width: int, itemsize: int, rows: int, sums: bool) -> Config:
    """sums: whether the bias's gradient is wanted, whose sums lie in registers beside the tile."""
    group = 16 // itemsize
    return walk_config(width, rows, 128 * group * (1 if sums else 2), group)


def unsupported_reason(device: str | torch.device, dtype: torch.dtype | None = None) -> str | None:
    return triton_lib.unsupported_reason(device) or limits.unsupported_reason(dtype)


def forward(
    x: torch.Tensor, bias: torch.Tensor | None, activation: str, second: bool, y: torch.Tensor
) -> None:
    """Fills y. x is rows."""
    width = y.shape[-1]
    rows = y.numel() // width
    config = forward_config(width, y.element_size())
    column_tiles = -(-width // config.block_n)
    with triton_lib.on_device(x):
        _forward(
            (-(-rows // config.rows) * column_tiles,),
            (x, dense(bias), dense(y)),
            (width, row_stride(x, 2 * width)),
            (rows, column_tiles),
            (activation, second, config.rows, config.block_n, config.group),
            config.num_warps,
        )


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    second: bool,
    dx: torch.Tensor,
    dbias: torch.Tensor | None,
) -> None:
    """Fills dx, and dbias where it is given. dy and x are rows."""
    width = dy.shape[-1]
    rows = dy.numel() // width
    config = backward_config(width, dy.element_size(), rows, dbias is not None)
    row_tiles = -(-rows // (config.rows * config.steps))
    column_tiles = -(-width // config.block_n)
    partial = None
    if dbias is not None:
        partial = torch.empty((1, row_tiles, 2 * width), dtype=torch.float32, device=dy.device)
    with triton_lib.on_device(dy):
        _backward(
            (row_tiles * column_tiles,),
            (dy, x, dense(bias), dense(dx), partial),
            (width, row_stride(dy, width), row_stride(x, 2 * width)),
            (rows, column_tiles),
            (activation, second, config.rows, config.steps, config.block_n, config.group),
            config.num_warps,
        )
        if dbias is not None and partial is not None:
            column_sums(partial, [dbias])
