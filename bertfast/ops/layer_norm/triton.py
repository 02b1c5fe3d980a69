"""y = (z - mean) * rstd * weight + bias, with z = dropout(x + x_bias) + residual.

Saved for the backward: z (unless it is x itself), mean and rstd (float32), the seed.
With g = dy * weight, h = (z - mean) * rstd and < > the mean over a row:
    dz = rstd * (g - <g> - h * <g * h>),  dresidual = dz,  dx = dropout(dz)
    dweight = sum of dy * h,  dbias = sum of dy,  dx_bias = sum of dx   (over rows)

Rows are N wide. Forward: one program a row, the row in registers, so the variance takes a second
pass over registers, not memory. Moves 2 to 5 values an element (x, residual; y, z, copy). copy is y
in x's dtype, for the 16-bit product that follows a float32 stream under autocast.
Backward: a program takes ROWS rows and sums the columns in registers; it writes one float32 row of
partial sums for each parameter, and a finalising kernel adds those in a fixed order. No atomics:
the same bits each run. Moves 3 or 4 values an element (dy, z; dz, dx).
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import triton_lib
from ..dropout import Dropout
from ..pointers import dense, row_stride
from ..triton_column_sum import column_sums
from ..triton_launch import Launch
from ..triton_lib import round_to, row_keep, to_float
from . import limits
from .run import Gradients, Norm, Outputs


@triton.jit(do_not_specialize=["site", "threshold"])
def layer_norm_fwd_kernel(
    x_ptr,  # rows of N
    residual_ptr,  # rows of N, or None
    x_bias_ptr,  # N, or None
    weight_ptr,
    bias_ptr,
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
        keep = row_keep(tl.load(seed_ptr), mask_row, site, threshold, BLOCK_N, GROUP)
        # `inside` too, though it changes nothing: so a dead part of the block makes no draws.
        z = tl.where(inside & keep, z * keep_scale, 0.0)
    if residual_ptr is not None:
        residual = residual_ptr + row * residual_row_stride + cols
        z += to_float(tl.load(residual, mask=inside, other=0.0))
    if z_ptr is not None:
        tl.store(z_ptr + row * N + cols, round_to(z, z_ptr.dtype.element_ty), mask=inside)

    # 2. mean, then the centred variance
    mean = tl.sum(z, axis=0) / N
    centred = tl.where(inside, z - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / N + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
        # A row of one value is its own mean: nothing flows back, exactly, not up to rounding.
        tl.store(rstd_ptr + row, 0.0 if N == 1 else rstd)

    # 3. scale, shift, write
    weight = to_float(tl.load(weight_ptr + cols, mask=inside, other=0.0))
    bias = to_float(tl.load(bias_ptr + cols, mask=inside, other=0.0))
    y = centred * rstd * weight + bias
    tl.store(y_ptr + row * N + cols, round_to(y, y_ptr.dtype.element_ty), mask=inside)
    if copy_ptr is not None:
        tl.store(copy_ptr + row * N + cols, round_to(y, copy_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["site", "threshold", "n_rows"])
def layer_norm_bwd_kernel(
    dy_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    seed_ptr,  # one int64, or None without dropout
    row_index_ptr,
    dz_ptr,  # None: not wanted
    dx_ptr,  # None: not wanted, or the same as dz
    dweight_ptr,  # partial sums, (programs, N) float32; None: not wanted
    dbias_ptr,
    dx_bias_ptr,  # None: not wanted
    dy_row_stride,
    z_row_stride,
    n_rows,
    site,
    threshold,
    keep_scale: tl.float32,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * ROWS
    cols = tl.max_contiguous(tl.arange(0, BLOCK_N), GROUP)
    inside = cols < N
    weight = to_float(tl.load(weight_ptr + cols, mask=inside, other=0.0))
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    dx_bias = tl.zeros((BLOCK_N,), tl.float32)

    for row in range(first, tl.minimum(first + ROWS, n_rows)):
        # 1. the row, normalised again
        dy = to_float(tl.load(dy_ptr + row * dy_row_stride + cols, mask=inside, other=0.0))
        z = to_float(tl.load(z_ptr + row * z_row_stride + cols, mask=inside, other=0.0))
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        h = tl.where(inside, (z - mean) * rstd, 0.0)

        # 2. this row's share of the parameters' gradients
        if dweight_ptr is not None:
            dweight += dy * h
            dbias += dy

        # 3. the two row means, then dz
        g = dy * weight
        mean_g = tl.sum(g, axis=0) / N
        mean_gh = tl.sum(g * h, axis=0) / N
        dz = (g - mean_g - h * mean_gh) * rstd
        if dz_ptr is not None:
            tl.store(dz_ptr + row * N + cols, round_to(dz, dz_ptr.dtype.element_ty), mask=inside)

        # 4. through the dropout
        if seed_ptr is not None:
            mask_row = row if row_index_ptr is None else tl.load(row_index_ptr + row)
            keep = row_keep(tl.load(seed_ptr), mask_row, site, threshold, BLOCK_N, GROUP)
            dz = tl.where(keep, dz * keep_scale, 0.0)
        if dx_ptr is not None:
            tl.store(dx_ptr + row * N + cols, round_to(dz, dx_ptr.dtype.element_ty), mask=inside)
        if dx_bias_ptr is not None:
            dx_bias += dz

    # 5. one row of partial sums
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * N + cols, dweight, mask=inside)
        tl.store(dbias_ptr + program * N + cols, dbias, mask=inside)
    if dx_bias_ptr is not None:
        tl.store(dx_bias_ptr + program * N + cols, dx_bias, mask=inside)


_forward = Launch(layer_norm_fwd_kernel)
_backward = Launch(layer_norm_bwd_kernel)


@dataclass(frozen=True)
class Config:
    """How a width is split. One warp a row up to 1024: no barrier, and a dead quarter of the block
    (768 of 1024) is removed by the compiler instead of predicated off."""

    block_n: int
    num_warps: int
    group: int  # neighbouring columns of a thread
    rows: int = 1  # a program's rows, backward only


@functools.lru_cache(256)
def _config(width: int, itemsize: int, rows: int = 1) -> Config:
    block = max(32, triton.next_power_of_2(width))
    num_warps = max(1, block // 1024)
    group = 16 // itemsize
    # 16 bytes, but 8 where 16 would leave a quarter of the registers empty: the 48 vectors of a row
    # of 384 are one and a half for each thread, the 96 of half the size are three.
    step = 32 * num_warps * group
    if group == 8 and triton.cdiv(width, step) * step >= width / 0.75:
        group = 4
    return Config(block, num_warps, group, rows)


def forward_config(width: int, itemsize: int) -> Config:
    return _config(width, itemsize)


def backward_config(width: int, itemsize: int) -> Config:
    # 16 rows a program keep the partial sums under an eighth of the traffic, and a float32 chain of
    # 16 additions is within the error budget whatever the number of rows.
    return _config(width, itemsize, rows=16)


def unsupported_reason(device, dtype=None, width=None) -> str | None:
    return triton_lib.unsupported_reason(device) or limits.unsupported_reason(dtype, width)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    norm: Norm,
    dropout: Dropout,
    outs: Outputs,
) -> None:
    """Fills the outputs that are there. x and residual are rows."""
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
                dense(norm.weight),
                dense(norm.bias),
                dense(dropout.seed),
                dense(dropout.rows),
                dense(outs.y),
                dense(outs.z),
                dense(outs.mean),
                dense(outs.rstd),
                dense(outs.copy),
            ),
            (row_stride(x, width), row_stride(residual, width)),
            (norm.eps, dropout.site, dropout.threshold, dropout.scale),
            (width, config.block_n, config.group),
            config.num_warps,
        )


def backward(
    dy: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout: Dropout,
    grads: Gradients,
) -> None:
    """Fills the gradients that are there. dy and z are rows."""
    width = dy.shape[-1]
    rows = dy.numel() // width
    config = backward_config(width, dy.element_size())
    programs = -(-rows // config.rows)
    outs = [sum_ for sum_ in grads[2:] if sum_ is not None]
    partial = torch.empty((len(outs), programs, width), dtype=torch.float32, device=dy.device)
    sums = iter(partial)
    partials = [None if sum_ is None else next(sums, None) for sum_ in grads[2:]]
    with triton_lib.on_device(dy):
        _backward(
            (programs,),
            (
                dy,
                z,
                dense(mean),
                dense(rstd),
                dense(weight),
                dense(dropout.seed),
                dense(dropout.rows),
                dense(grads.dz),
                dense(grads.dx),
                *partials,
            ),
            (row_stride(dy, width), row_stride(z, width)),
            (rows, dropout.site, dropout.threshold, dropout.scale),
            (width, config.block_n, config.group, config.rows),
            config.num_warps,
        )
        if outs:
            column_sums(partial, outs)
