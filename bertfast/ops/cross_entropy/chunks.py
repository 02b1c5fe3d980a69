"""Losses and gradients of labelled rows, so many rows at a time that their logits stay small.

    z = h W^T + b,  lse = log sum exp z                         for each row, over the vocabulary
    loss = lse - (1 - s) z[label] - s mean(z)
    dz = scale (softmax(z) - (1 - s) onehot(label) - s / V)
    dh = dz W,  dW = sum of dz^T h,  db = sum of dz             s: label smoothing

The gradients are made beside the losses, while a chunk's logits are there: scale is what each row's
loss counts. Where that is known only in the backward (no reduction), the logits are made again.

Logits, losses and sums are float32 (float64 stays so). On a GPU 16-bit products add up in float32
and dz is rounded for the products that follow; on a CPU, whose 16-bit products round their results,
all of it is float32.
"""

from typing import NamedTuple

import torch

# Logits of one chunk: a few dozen MB, and of some hundred rows, so that products are efficient.
CHUNK_BYTES = 64 << 20
LEAST_ROWS = 64


class Wanted(NamedTuple):
    """The gradients that are computed."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Wanted(False, False, False)


class Gradients(NamedTuple):
    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def chunk_rows(vocabulary: int) -> int:
    return max(LEAST_ROWS, CHUNK_BYTES // (4 * vocabulary))


def losses_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    smoothing: float,
    scale: torch.Tensor | None,
    wanted: Wanted,
) -> tuple[torch.Tensor, Gradients]:
    """hidden (rows, width), labels (rows,), with -1 for rows that don't count. scale: a number, or
    one for each row; None: no gradients. All tensors are without a history."""
    with torch.autocast(hidden.device.type, enabled=False):  # dtypes are what they shall be
        return _walk(hidden, weight, bias, labels, smoothing, scale, wanted)


def _walk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    smoothing: float,
    scale: torch.Tensor | None,
    wanted: Wanted,
) -> tuple[torch.Tensor, Gradients]:
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    losses = torch.empty(rows, dtype=compute, device=hidden.device)
    wanted = NOTHING if scale is None else wanted
    dhidden = torch.empty_like(hidden) if wanted.hidden else None
    dweight = weight.new_zeros(weight.shape, dtype=compute) if wanted.weight else None
    dbias = weight.new_zeros(vocabulary, dtype=compute) if wanted.bias else None
    # On a CPU once for all chunks.
    factor = weight if weight.is_cuda else weight.to(compute)
    step = chunk_rows(vocabulary)
    for first in range(0, rows, step):
        # 1. logits
        part = slice(first, first + step)
        h = hidden[part] if weight.is_cuda else hidden[part].to(compute)
        z = _product(h, factor.t(), compute)
        if bias is not None:
            z += bias

        # 2. losses
        counted = labels[part] >= 0
        label = labels[part].clamp(min=0)[:, None]
        lse = torch.logsumexp(z, 1)
        loss = lse - (1 - smoothing) * z.gather(1, label).squeeze(1)
        if smoothing:
            loss -= smoothing * z.mean(1)
        losses[part] = torch.where(counted, loss, 0.0)
        if not any(wanted) or scale is None:
            continue

        # 3. dz, in the place of the logits
        dz = z.sub_(lse[:, None]).exp_()
        if smoothing:
            dz -= smoothing / vocabulary
        dz.scatter_add_(1, label, dz.new_full((1, 1), smoothing - 1).expand(label.shape))
        dz *= torch.where(counted, scale[part] if scale.ndim else scale, 0.0)[:, None]

        # 4. the gradients
        if dbias is not None:
            dbias += dz.sum(0)
        dz = dz.to(factor.dtype)
        if dhidden is not None:
            dhidden[part] = _product(dz, factor, compute).to(dhidden.dtype)
        if dweight is not None:
            _add_product(dweight, dz.t(), h)
    if dweight is not None:
        dweight = dweight.to(weight.dtype)
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    return losses, Gradients(dhidden, dweight, dbias)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b, with results of a dtype that may be wider than the operands'."""
    return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def _add_product(sum_: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if sum_.dtype == a.dtype:
        sum_.addmm_(a, b)
    else:
        sum_ += torch.mm(a, b, out_dtype=sum_.dtype)
