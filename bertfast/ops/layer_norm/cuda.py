"""layer_norm by csrc/kernels/layer_norm.cu, on a GPU or compiled for the host."""

import functools

import torch

from .. import dropout, native
from ..native import DTYPE_TAG
from ..pointers import pointer, row_pointer
from . import limits

# A row group adds at most this many rows in one float32 chain before the compensated final sum:
# what that rounds is within the error budget, whatever the number of rows.
LONGEST_CHAIN = 32


def unsupported_reason(device_type, dtype=None, width=None) -> str | None:
    return native.unsupported_reason(device_type) or limits.unsupported_reason(dtype, width)


def forward(x, weight, bias, residual, x_bias, seed, row_index, eps, threshold, site, y, z, stats):
    """Fills y and, where they are given, z and stats = (mean, rstd). x and residual are rows."""
    mean, rstd = stats if stats is not None else (None, None)
    width = x.shape[-1]
    x_pointer, x_stride = row_pointer(x, width)
    residual_pointer, residual_stride = row_pointer(residual, width)
    native.module_for(x).layer_norm_forward(
        x_pointer,
        residual_pointer,
        pointer(x_bias),
        pointer(weight),
        pointer(bias),
        pointer(seed) if threshold else 0,
        pointer(row_index),
        pointer(y),
        pointer(z),
        pointer(mean),
        pointer(rstd),
        x.numel() // width,
        x_stride,
        residual_stride,
        width,
        eps,
        dropout.keep_scale(threshold),
        threshold,
        site,
        DTYPE_TAG[x.dtype],
        DTYPE_TAG[y.dtype],
        *native.place(x),
    )


@functools.cache
def _rows_per_block(module, width: int, tag: int) -> int:
    return module.layer_norm_rows_per_block(width, tag)


def _blocks(module, dy: torch.Tensor) -> int:
    """The backward's grid: two blocks a multiprocessor, more where their chains would grow long."""
    width = dy.shape[-1]
    rows = dy.numel() // width
    at_a_time = _rows_per_block(module, width, DTYPE_TAG[dy.dtype])
    most = -(-rows // at_a_time)
    resident = 2 * native.multiprocessors(dy)
    return min(most, max(resident, -(-rows // (at_a_time * LONGEST_CHAIN))))


def backward(dy, z, mean, rstd, weight, seed, row_index, threshold, site, dz, dx, params, x_bias):
    """Fills dz and dx where given, params = (dweight, dbias) or None, x_bias = dx_bias or None."""
    module = native.module_for(dy)
    width = dy.shape[-1]
    blocks = _blocks(module, dy)
    outs = [*(params or ()), *(() if x_bias is None else (x_bias,))]
    partial = torch.empty((len(outs), blocks, width), dtype=torch.float32, device=dy.device)
    sums = [pointer(partial) + 4 * i * blocks * width for i in range(len(outs))]
    tag = DTYPE_TAG[dy.dtype]
    place = native.place(dy)
    dy_pointer, dy_stride = row_pointer(dy, width)
    z_pointer, z_stride = row_pointer(z, width)
    module.layer_norm_backward(
        dy_pointer,
        z_pointer,
        pointer(mean),
        pointer(rstd),
        pointer(weight),
        pointer(seed) if threshold else 0,
        pointer(row_index),
        pointer(dz),
        pointer(dx),
        sums[0] if params else 0,
        sums[1] if params else 0,
        sums[-1] if x_bias is not None else 0,
        dy.numel() // width,
        dy_stride,
        z_stride,
        width,
        blocks,
        dropout.keep_scale(threshold),
        threshold,
        site,
        DTYPE_TAG[dx.dtype] if dx is not None else tag,
        tag,
        *place,
    )
    if outs:
        pointers = [pointer(out) for out in outs] + [0] * (3 - len(outs))
        module.column_sum(pointer(partial), *pointers, len(outs), blocks, width, tag, *place)
