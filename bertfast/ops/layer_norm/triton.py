"""y = (z - mean) * rstd * weight + bias, with z = dropout(x + x_bias) + residual.

Saved for the backward: z (unless it is x itself), mean and rstd (float32), the seed.
With g = dy * weight, h = (z - mean) * rstd and < > the mean over a row:
    dz = rstd * (g - <g> - h * <g * h>) + dsum,  dresidual = dz,  dx = dropout(dz)
    dweight = sum of dy * h,  dbias = sum of dy,  dx_bias = sum of dx   (over rows)
dsum is z's own gradient, where z was returned as well. bias may be absent. RMSNorm is the same
without mean and <g>. Without a weight nothing is normalised: y = z, dz = dy.

Rows are N wide. Forward: one program a row, the row in registers, so the variance takes a second
pass over registers, not memory. Moves 2 to 5 values an element (x, residual; y, z, copy). copy is y
in x's dtype, for the 16-bit product that follows a float32 stream under autocast.
Backward: a program takes ROWS rows at a time, one of up to 1024 columns a warp, and sums their
columns in registers; it writes one float32 row of partial sums for each parameter, and a finalising
kernel adds those in a fixed order. Which rows a program takes depends on their number alone. No
atomics: the same bits each run. Moves 3 to 5 values an element (dy, z, dsum; dz, dx).
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import triton_lib
from ..dropout import Dropout
from ..pointers import dense, row_stride
from ..rows import chain
from ..triton_column_sum import column_sums
from ..triton_launch import Launch
from ..triton_lib import round_to, row_keep, to_float
from . import limits
from .run import Gradients, Norm, Outputs, Saved


@triton.jit(do_not_specialize=["site", "threshold"])
def layer_norm_fwd_kernel(
    x_ptr,  # rows of N
    residual_ptr,  # rows of N, or None
    x_bias_ptr,  # N, or None
    weight_ptr,  # None: y is z
    bias_ptr,  # None: not added
    seed_ptr,  # one int64, or None without dropout
    row_index_ptr,  # one int64 a row, or None: rows count from 0
    y_ptr,
    z_ptr,  # None: not saved
    mean_ptr,  # None: not saved
    rstd_ptr,
    copy_ptr,  # None: not wanted
    x_row_stride,
    residual_row_stride,
    eps: tl.float32,
    site,
    threshold,
    keep_scale: tl.float32,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    RMS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # A thread takes GROUP neighbouring columns of every tensor, also where x is narrower than the
    # rest: else values would move between threads.
    cols = tl.max_contiguous(tl.arange(0, BLOCK_N), GROUP)
    inside = cols < N

    # 1. z = dropout(x + x_bias) + residual
    z = to_float(tl.load(x_ptr + row * x_row_stride + cols, mask=inside, other=0.0))
    if x_bias_ptr is not None:
        z += to_float(tl.load(x_bias_ptr + cols, mask=inside, other=0.0))
    if seed_ptr is not None:
        mask_row = row if row_index_ptr is None else tl.load(row_index_ptr + row)
        group = tl.arange(0, BLOCK_N // GROUP)
        keep = row_keep(tl.load(seed_ptr), mask_row, group, site, threshold, GROUP)
        # `inside` too, though it changes nothing: so a dead part of the block makes no draws.
        z = tl.where(inside & tl.reshape(keep, (BLOCK_N,)), z * keep_scale, 0.0)
    if residual_ptr is not None:
        residual = residual_ptr + row * residual_row_stride + cols
        z += to_float(tl.load(residual, mask=inside, other=0.0))
    if z_ptr is not None:
        tl.store(z_ptr + row * N + cols, round_to(z, z_ptr.dtype.element_ty), mask=inside)

    if weight_ptr is None:
        y = z
    else:
        # 2. mean, then the centred variance
        if RMS:
            centred = z
        else:
            mean = tl.sum(z, axis=0) / N
            centred = tl.where(inside, z - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / N + eps)
        if rstd_ptr is not None:
            if mean_ptr is not None:
                tl.store(mean_ptr + row, mean)
            # A row of one value is its own mean: nothing flows back, exactly, not up to rounding.
            tl.store(rstd_ptr + row, 0.0 if N == 1 and not RMS else rstd)

        # 3. scale, shift, write
        weight = to_float(tl.load(weight_ptr + cols, mask=inside, other=0.0))
        bias = 0.0
        if bias_ptr is not None:
            bias = to_float(tl.load(bias_ptr + cols, mask=inside, other=0.0))
        y = centred * rstd * weight + bias
    tl.store(y_ptr + row * N + cols, round_to(y, y_ptr.dtype.element_ty), mask=inside)
    if copy_ptr is not None:
        tl.store(copy_ptr + row * N + cols, round_to(y, copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_sums(values):
    """The sums over pieces and columns of (pieces, rows, columns)."""
    rows: tl.constexpr = values.shape[1]
    of_row: tl.constexpr = values.shape[0] * values.shape[2]
    return tl.sum(tl.reshape(tl.permute(values, (1, 0, 2)), (rows, of_row)), axis=1)


@triton.jit
def over_rows(sums, inside):
    """The sums of pieces over their rows. What is outside is left out, and so never made."""
    return tl.sum(tl.where(inside, sums, 0.0), axis=1)


@triton.jit(do_not_specialize=["site", "threshold", "n_rows", "rows_each"])
def layer_norm_bwd_kernel(
    dy_ptr,
    dsum_ptr,  # None: z was not returned
    z_ptr,  # this and the three below are None where nothing was normalised
    mean_ptr,  # None of RMSNorm
    rstd_ptr,
    weight_ptr,
    seed_ptr,  # one int64, or None without dropout
    row_index_ptr,
    dz_ptr,  # None: not wanted
    dx_ptr,  # None: not wanted, or the same as dz
    dweight_ptr,  # partial sums, (programs, N) float32; None: not wanted
    dbias_ptr,  # None where there is no bias, too
    dx_bias_ptr,  # None: not wanted
    dy_row_stride,
    dsum_row_stride,
    z_row_stride,
    n_rows,
    rows_each,  # of a program, a multiple of ROWS
    site,
    threshold,
    keep_scale: tl.float32,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,  # columns of the warps that share a row, GROUP a thread
    ROWS: tl.constexpr,  # rows at a time
):
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_each
    # 0. (pieces of a row, rows, columns of a piece): Triton gives warps to the last dimension, then
    # to the one before it. So a row's warps hold all of it, and its sums stay among them.
    PIECES: tl.constexpr = BLOCK_N // WIDE
    piece = tl.arange(0, PIECES)[:, None, None]
    cols = piece * WIDE + tl.max_contiguous(tl.arange(0, WIDE), GROUP)[None, None, :]
    cols = tl.broadcast_to(cols, (PIECES, ROWS, WIDE))
    # Where a thread has this many columns, the weight doesn't fit beside their sums and draws.
    keep_weight: tl.constexpr = seed_ptr is None or PIECES * GROUP < 32
    if keep_weight and weight_ptr is not None:
        weight = to_float(tl.load(weight_ptr + cols, mask=cols < N, other=0.0))
    dweight = tl.zeros((PIECES, ROWS, WIDE), tl.float32)
    dbias = tl.zeros((PIECES, ROWS, WIDE), tl.float32)
    dx_bias = tl.zeros((PIECES, ROWS, WIDE), tl.float32)

    for start in range(first, tl.minimum(first + rows_each, n_rows), ROWS):
        # 1. the rows, normalised again
        row = start + tl.arange(0, ROWS)
        live = row < n_rows
        at = row[None, :, None]
        inside = live[None, :, None] & (cols < N)
        dy = to_float(tl.load(dy_ptr + at * dy_row_stride + cols, mask=inside, other=0.0))
        if weight_ptr is None:
            dz = dy
        else:
            z = to_float(tl.load(z_ptr + at * z_row_stride + cols, mask=inside, other=0.0))
            mean = 0.0
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + row, mask=live, other=0.0)[None, :, None]
            rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)[None, :, None]
            h = tl.where(cols < N, (z - mean) * rstd, 0.0)

            # 2. these rows' share of the parameters' gradients
            if dweight_ptr is not None:
                dweight += dy * h
            if dbias_ptr is not None:
                dbias += dy

            # 3. the two means of each row, then dz
            if not keep_weight:
                weight = to_float(tl.load(weight_ptr + cols, mask=cols < N, other=0.0))
            g = dy * weight
            mean_g = 0.0
            if mean_ptr is not None:
                mean_g = row_sums(g)[None, :, None] / N
            mean_gh = row_sums(g * h)[None, :, None] / N
            dz = (g - mean_g - h * mean_gh) * rstd
        if dsum_ptr is not None:
            dsum = dsum_ptr + at * dsum_row_stride + cols
            dz += to_float(tl.load(dsum, mask=inside, other=0.0))
        if dz_ptr is not None:
            tl.store(dz_ptr + at * N + cols, round_to(dz, dz_ptr.dtype.element_ty), mask=inside)

        # 4. through the dropout
        if seed_ptr is not None:
            mask_row = row
            if row_index_ptr is not None:
                mask_row = tl.load(row_index_ptr + row, mask=live, other=0)
            group = piece * (WIDE // GROUP) + tl.arange(0, WIDE // GROUP)[None, None, :]
            seed = tl.load(seed_ptr)
            keep = row_keep(seed, mask_row[None, :, None], group, site, threshold, GROUP)
            dz = tl.where(tl.reshape(keep, (PIECES, ROWS, WIDE)), dz * keep_scale, 0.0)
        if dx_ptr is not None:
            tl.store(dx_ptr + at * N + cols, round_to(dz, dx_ptr.dtype.element_ty), mask=inside)
        if dx_bias_ptr is not None:
            dx_bias += dz

    # 5. one row of partial sums
    out = tl.arange(0, PIECES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * N + out, over_rows(dweight, cols < N), mask=out < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * N + out, over_rows(dbias, cols < N), mask=out < N)
    if dx_bias_ptr is not None:
        tl.store(dx_bias_ptr + program * N + out, over_rows(dx_bias, cols < N), mask=out < N)


_forward = Launch(layer_norm_fwd_kernel)
_backward = Launch(layer_norm_bwd_kernel)


@dataclass(frozen=True)
class Config:
    """How a width is split. One warp a row up to 1024: no barrier, and a dead quarter of the block
    (768 of 1024) is removed by the compiler instead of predicated off."""

    block_n: int
    num_warps: int
    group: int  # neighbouring columns of a thread


@dataclass(frozen=True)
class BackwardConfig(Config):
    wide: int  # columns that a row's warps hold at a time
    rows: int  # of a program at a time


@functools.lru_cache(256)
def forward_config(width: int, itemsize: int) -> Config:
    block = max(32, triton.next_power_of_2(width))
    num_warps = max(1, block // 1024)
    group = 16 // itemsize
    # 16 bytes, but 8 where 16 would leave a quarter of the registers empty: the 48 vectors of a row
    # of 384 are one and a half for each thread, the 96 of half the size are three.
    step = 32 * num_warps * group
    if group == 8 and triton.cdiv(width, step) * step >= width / 0.75:
        group = 4
    return Config(block, num_warps, group)


# Two on each of 128 multiprocessors: what the registers allow of 4 warps that have their columns'
# sums in them, and 24 KB of loads under way on each.
PROGRAMS = 256
# Rows that are added in one float32 chain, at most: what that rounds is within the error budget,
# whatever the number of rows.
LONGEST_CHAIN = 32


@functools.lru_cache(256)
def backward_config(width: int, itemsize: int) -> BackwardConfig:
    """At a time a program takes four rows of up to 1024 columns, of narrower ones more."""
    of_row = forward_config(width, itemsize)
    wide = min(of_row.block_n, 32 * of_row.num_warps * of_row.group)
    rows = min(16, max(1, 4096 // of_row.block_n))
    num_warps = max(1, rows * wide // (32 * of_row.group))
    return BackwardConfig(of_row.block_n, num_warps, of_row.group, wide, rows)


def unsupported_reason(device, dtype=None, width=None) -> str | None:
    return triton_lib.unsupported_reason(device) or limits.unsupported_reason(dtype, width)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    norm: Norm | None,
    dropout: Dropout,
    outs: Outputs,
) -> None:
    """Fills the outputs that are there. x and residual are rows."""
    weight, bias, eps, rms = norm or (None, None, 0.0, False)
    width = x.shape[-1]
    rows = x.numel() // width
    config = forward_config(width, outs.y.element_size())
    with triton_lib.on_device(x):
        _forward(
            (rows,),
            (
                x,
                residual,
                dense(x_bias),
                dense(weight),
                dense(bias),
                dense(dropout.seed),
                dense(dropout.rows),
                dense(outs.y),
                dense(outs.z),
                dense(outs.mean),
                dense(outs.rstd),
                dense(outs.copy),
            ),
            (row_stride(x, width), row_stride(residual, width)),
            (eps, dropout.site, dropout.threshold, dropout.scale),
            (width, config.block_n, config.group, rms),
            config.num_warps,
        )


def backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    saved: Saved,
    weight: torch.Tensor | None,
    dropout: Dropout,
    grads: Gradients,
) -> None:
    """Fills the gradients that are there. dy, dsum and z are rows."""
    width = dy.shape[-1]
    rows = dy.numel() // width
    config = backward_config(width, dy.element_size())
    rows_each = config.rows * chain(-(-rows // config.rows), PROGRAMS, LONGEST_CHAIN)
    programs = -(-rows // rows_each)
    outs = [sum_ for sum_ in grads[2:] if sum_ is not None]
    partial = torch.empty((len(outs), programs, width), dtype=torch.float32, device=dy.device)
    # 1 is a constant: where there is no dsum the kernel is as if it had no such parameter.
    dsum_row_stride = 1 if dsum is None else row_stride(dsum, width)
    sums = iter(partial)
    partials = [None if sum_ is None else next(sums, None) for sum_ in grads[2:]]
    with triton_lib.on_device(dy):
        _backward(
            (programs,),
            (
                dy,
                dsum,
                saved.z,
                dense(saved.mean),
                dense(saved.rstd),
                dense(weight),
                dense(dropout.seed),
                dense(dropout.rows),
                dense(grads.dz),
                dense(grads.dx),
                *partials,
            ),
            (row_stride(dy, width), dsum_row_stride, row_stride(saved.z, width)),
            (rows, rows_each, dropout.site, dropout.threshold, dropout.scale),
            (width, config.block_n, config.group, config.wide, config.rows),
            config.num_warps,
        )
        if outs:
            column_sums(partial, outs)
