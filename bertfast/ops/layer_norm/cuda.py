"""layer_norm by csrc/kernels/layer_norm.cu, on a GPU or compiled for the host."""

import functools

import torch

from .. import native
from ..dropout import Dropout
from ..native import DTYPE_TAG
from ..pointers import pointer, row_pointer
from . import limits
from .run import Gradients, Norm, Outputs

# A row group adds at most this many rows in one float32 chain before the compensated final sum:
# what that rounds is within the error budget, whatever the number of rows.
LONGEST_CHAIN = 32


def unsupported_reason(device_type, dtype=None, width=None) -> str | None:
    return native.unsupported_reason(device_type) or limits.unsupported_reason(dtype, width)


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
    x_pointer, x_stride = row_pointer(x, width)
    residual_pointer, residual_stride = row_pointer(residual, width)
    native.module_for(x).layer_norm_forward(
        x_pointer,
        residual_pointer,
        pointer(x_bias),
        pointer(norm.weight),
        pointer(norm.bias),
        pointer(dropout.seed),
        pointer(dropout.rows),
        pointer(outs.y),
        pointer(outs.z),
        pointer(outs.mean),
        pointer(outs.rstd),
        x.numel() // width,
        x_stride,
        residual_stride,
        width,
        norm.eps,
        dropout.scale,
        dropout.threshold,
        dropout.site,
        DTYPE_TAG[x.dtype],
        DTYPE_TAG[outs.y.dtype],
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
    module = native.module_for(dy)
    width = dy.shape[-1]
    blocks = _blocks(module, dy)
    outs = [sum_ for sum_ in grads[2:] if sum_ is not None]
    partial = torch.empty((len(outs), blocks, width), dtype=torch.float32, device=dy.device)
    sums = iter(pointer(partial) + 4 * i * blocks * width for i in range(len(outs)))
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
        pointer(dropout.seed),
        pointer(dropout.rows),
        pointer(grads.dz),
        pointer(grads.dx),
        *(0 if sum_ is None else next(sums, 0) for sum_ in grads[2:]),
        dy.numel() // width,
        dy_stride,
        z_stride,
        width,
        blocks,
        dropout.scale,
        dropout.threshold,
        dropout.site,
        DTYPE_TAG[grads.dx.dtype] if grads.dx is not None else tag,
        tag,
        *place,
    )
    if outs:
        pointers = [pointer(out) for out in outs] + [0] * (3 - len(outs))
        module.column_sum(pointer(partial), *pointers, len(outs), blocks, width, tag, *place)
