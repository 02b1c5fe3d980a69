"""Losses and gradients of labelled rows, so many rows at a time that their logits stay small.

    z = h W^T + b,  loss = cross_entropy(z, label)              for each row
    dz = dloss / dz                                             triton.py, reference_rows.py
    dh = dz W,  dW = sum of dz^T h,  db = sum of dz

The gradients are made beside the losses, while a chunk's logits are there. They are those of the
losses' sum: its own derivative, by which they are multiplied, comes in the backward. Thus dz is
between -1 and 1, and nothing of it vanishes in float16 because the loss is divided by thousands
of rows, or before a gradient scaler has multiplied it. Without a reduction each row has a
derivative of its own, known in the backward only: there the logits are made again.

Logits, losses and sums are float32 (float64 stays so). On a GPU 16-bit products add up in float32
and dz is rounded for the products that follow; on a CPU, whose 16-bit products round their results,
operands are float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import dispatch
from ..product import product
from . import limits, reference_rows

OP = "linear_cross_entropy"

# Logits of one chunk: a few dozen MB on a CPU, and of some hundred rows, so that products are
# efficient. On a GPU so many that the labelled rows of 16,384 tokens are one chunk for BERT-base
# with 15 %: each further one moves 16 bytes for each value of the weight's gradient.
CHUNK_BYTES = 64 << 20
TIMES_ON_GPU = 5
LEAST_ROWS = 64
# Chunks begin at multiples of 16 bytes in whatever has a value for each row: the kernels of all are
# then of one form.
ROWS_MULTIPLE = 16


class Wanted(NamedTuple):
    """The gradients that are computed."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Wanted(False, False, False)


class Gradients(NamedTuple):
    """In float32, or float64."""

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def chunk_rows(wide: int, on_gpu: bool) -> int:
    """The most. wide: the vocabulary, or its room in memory."""
    rows = CHUNK_BYTES * (TIMES_ON_GPU if on_gpu else 1) // (4 * wide)
    return max(LEAST_ROWS, rows // ROWS_MULTIPLE * ROWS_MULTIPLE)


def losses_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    smoothing: float,
    scale: torch.Tensor | None,
    wanted: Wanted,
    backend: str,
) -> tuple[torch.Tensor, Gradients]:
    """hidden (rows, width), labels (rows,), with -1 for rows that don't count. scale: a number for
    each row, by which its derivative is multiplied; None: 1. All tensors are without a history."""
    with torch.autocast(hidden.device.type, enabled=False):  # dtypes are what they shall be
        return _walk(hidden, weight, bias, labels, smoothing, scale, wanted, backend)


def _walk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    smoothing: float,
    scale: torch.Tensor | None,
    wanted: Wanted,
    backend: str,
) -> tuple[torch.Tensor, Gradients]:
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    on_gpu, by_kernels = weight.is_cuda, backend != "torch"
    module = dispatch.backend_module(OP, backend) if by_kernels else reference_rows
    wide = -(-vocabulary // limits.MULTIPLE) * limits.MULTIPLE if by_kernels else vocabulary
    losses = hidden.new_empty(rows, dtype=compute)
    dhidden = hidden.new_empty(hidden.shape, dtype=compute) if wanted.hidden else None
    dweight = weight.new_empty(weight.shape, dtype=compute) if wanted.weight else None
    if dweight is not None and not rows:
        dweight.zero_()
    dbias = weight.new_zeros(wide, dtype=compute) if wanted.bias else None

    # Memory for a chunk, used again by the next. dz has another dtype where it is rounded: for a
    # GPU's products, and by kernels that run on a CPU as they do on a GPU.
    chunks = max(1, -(-rows // chunk_rows(max(1, wide), on_gpu)))
    step = max(1, -(-rows // (chunks * ROWS_MULTIPLE))) * ROWS_MULTIPLE  # chunks are alike
    room = hidden.new_empty((min(step, rows), wide), dtype=compute)
    room[:, vocabulary:] = 0
    rounds = (on_gpu or by_kernels) and hidden.dtype != compute
    rounded = torch.empty_like(room, dtype=hidden.dtype) if rounds and any(wanted) else None
    factor = weight if on_gpu else weight.to(compute)  # on a CPU once for all chunks
    if bias is not None and wide != vocabulary:
        bias = F.pad(bias, (0, wide - vocabulary))
    elif bias is not None:
        bias = bias.contiguous()

    for first in range(0, rows, step):
        # 1. logits
        part = slice(first, first + step)
        h = hidden[part] if on_gpu else hidden[part].to(compute)
        z = room[: len(h), :vocabulary]
        product(h, factor.t(), z)

        # 2. losses, and dz in the place of the logits
        dz = None
        if any(wanted):
            dz = z if rounded is None else rounded[: len(h), :vocabulary]
        weighting = None if scale is None else scale[part]
        module.forward(z, bias, labels[part], smoothing, losses[part], weighting, dz, dbias)
        if dz is None:
            continue

        # 3. the gradients
        if not on_gpu:
            dz = dz.to(compute)
        if dhidden is not None:
            product(dz, factor, dhidden[part])
        if dweight is not None:
            _add_product(dweight, dz.t(), h, begun=first > 0)
    return losses, Gradients(dhidden, dweight, None if dbias is None else dbias[:vocabulary])


def _add_product(sum_: torch.Tensor, a: torch.Tensor, b: torch.Tensor, begun: bool) -> None:
    """Adds a b to a sum that has begun; else the sum is a b."""
    if not begun:
        product(a, b, sum_)
    elif sum_.dtype == a.dtype:
        sum_.addmm_(a, b)
    else:
        sum_ += torch.mm(a, b, out_dtype=sum_.dtype)
