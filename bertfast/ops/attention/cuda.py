"""attention by csrc/kernels/attention_fwd.cu and attention_bwd.cu, on a GPU or for the host."""

import torch
import torch.nn.functional as F

from ...packing.sequences import Sequences
from .. import native
from ..dropout import Dropout
from ..native import DTYPE_TAG
from ..pointers import Rows, head_rows, pointer, row_pointer
from . import limits
from .run import AnyHeads, Heads, Saved

_VECTOR = 8  # values in 16 bytes, which is how tiles are copied


def unsupported_reason(device_type, dtype=None, head_dim=None, size=None) -> str | None:
    reason = native.unsupported_reason(device_type)
    if reason is None and dtype not in (None, torch.float16, torch.bfloat16):
        reason = f"its tensor-core kernels take float16 and bfloat16, got {dtype}"
    return reason or limits.unsupported_reason(head_dim, size, limits.MAX_MASKED_LENGTH)


def _writable(x: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, Rows]:
    """x and where its heads lie, if a kernel can read and write them there, 16 bytes at a time;
    else another tensor, of whole vectors."""
    rows = head_rows(x)
    address, batch, token, head = rows
    if not (head_dim % _VECTOR or address % 16 or (batch | token | head) % _VECTOR):
        return x, rows
    width = -(-head_dim // _VECTOR) * _VECTOR
    other = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    return other, head_rows(other)


def _readable(x: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, Rows]:
    """The same with x's values, and zeros up to a whole vector."""
    tensor, rows = _writable(x, head_dim)
    if tensor is not x:
        tensor.copy_(F.pad(x, (0, -head_dim % _VECTOR)))
    return tensor, rows


def _give_back(written: torch.Tensor, x: torch.Tensor) -> None:
    if written is not x:
        x.copy_(written[..., : x.shape[-1]])


def _batch(q: torch.Tensor, sequences: Sequences, dropout: Dropout) -> tuple:
    """What both passes are told about a batch."""
    heads, head_dim = q.shape[-2:]
    head_dim += -head_dim % _VECTOR
    key_mask, cu_seqlens, max_seqlen, tiles, tile, _ = sequences
    if cu_seqlens is None:
        batch, length = q.shape[:2]
        statistics = (heads * length, length)
    else:
        batch, length = cu_seqlens.shape[0] - 1, max_seqlen
        statistics = (0, q.shape[0])
    mask = row_pointer(key_mask, length)
    entries = 0 if tiles is None else tiles.shape[0]
    packed = (pointer(cu_seqlens), pointer(tiles), entries, tile)
    drops = (pointer(dropout.seed), dropout.scale, min(dropout.threshold, 65535), dropout.site)
    return (mask, packed, drops, statistics, (batch, length, heads, head_dim))


def _parts(heads: AnyHeads) -> Heads:
    return Heads(*heads.unbind(-3)) if isinstance(heads, torch.Tensor) else heads


def forward(
    heads: AnyHeads,
    sequences: Sequences,
    scale: float,
    dropout: Dropout,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out and, if it is given, lse. The last dimension of every tensor is dense."""
    q, k, v = _parts(heads)
    head_dim = q.shape[-1]
    (q, q_rows), (k, k_rows), (v, v_rows) = (_readable(x, head_dim) for x in (q, k, v))
    written, out_rows = _writable(out, head_dim)
    batch = _batch(q, sequences, dropout)
    native.module_for(q).attention_forward(
        *(q_rows, k_rows, v_rows, out_rows, pointer(lse)),
        *(*batch, scale, DTYPE_TAG[q.dtype]),
        *native.place(q),
    )
    _give_back(written, out)


def backward(
    dout: torch.Tensor,
    heads: AnyHeads,
    saved: Saved,
    sequences: Sequences,
    scale: float,
    dropout: Dropout,
    grads: AnyHeads,
) -> None:
    """Fills the gradients."""
    q, k, v = _parts(heads)
    out, lse = saved
    head_dim = q.shape[-1]
    inputs = [_readable(x, head_dim) for x in (dout, q, k, v, out)]
    outputs = [_writable(x, head_dim) for x in _parts(grads)]
    batch = _batch(q, sequences, dropout)
    # lse and delta of each row, from the first kernel to the second.
    statistics = torch.empty((*lse.shape, 2), dtype=torch.float32, device=lse.device)
    native.module_for(q).attention_backward(
        *(rows for _, rows in inputs),
        *(pointer(lse), pointer(statistics)),
        *(rows for _, rows in outputs),
        *(*batch, scale, DTYPE_TAG[q.dtype]),
        *native.place(q),
    )
    for (written, _), grad in zip(outputs, _parts(grads), strict=True):
        _give_back(written, grad)
