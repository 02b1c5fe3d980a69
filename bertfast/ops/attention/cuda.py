"""attention by csrc/kernels/attention_fwd.cu and attention_bwd.cu, on a GPU or for the host."""

import torch
import torch.nn.functional as F

from .. import dropout, native
from ..native import DTYPE_TAG, pointer

MAX_HEAD_DIM = 128
_VECTOR = 8  # values in 16 bytes, which is how tiles are copied


def unsupported_reason(device_type, dtype=None, head_dim=None) -> str | None:
    reason = native.unsupported_reason(device_type)
    if reason is None and dtype not in (None, torch.float16, torch.bfloat16):
        reason = f"its tensor-core kernels take float16 and bfloat16, got {dtype}"
    if reason is None and head_dim is not None and not 1 <= head_dim <= MAX_HEAD_DIM:
        reason = f"the head dimension must be between 1 and {MAX_HEAD_DIM}, got {head_dim}"
    return reason


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of batch (0 if packed), token and head."""
    strides = x.stride()
    return strides[:3] if len(strides) == 4 else (0, *strides[:2])


def _in_place(x: torch.Tensor) -> bool:
    """Whether a kernel can read and write x where it is, 16 bytes at a time."""
    return (
        x.shape[-1] % _VECTOR == 0
        and x.data_ptr() % 16 == 0
        and all(stride % _VECTOR == 0 for stride in x.stride()[:-1])
    )


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x, or where that can't be read in place a copy, with zeros up to a whole vector."""
    if _in_place(x):
        return x
    return _writable(x).copy_(F.pad(x, (0, -x.shape[-1] % _VECTOR)))


def _writable(x: torch.Tensor) -> torch.Tensor:
    if _in_place(x):
        return x
    width = -(-x.shape[-1] // _VECTOR) * _VECTOR
    return torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)


def _give_back(written: torch.Tensor, x: torch.Tensor) -> None:
    if written is not x:
        x.copy_(written[..., : x.shape[-1]])


def _rows(x: torch.Tensor) -> tuple[int, int, int, int]:
    return (x.data_ptr(), *_strides(x))


def _batch(q, key_mask, cu_seqlens, tiles, tile, seed, max_seqlen, threshold, site):
    """What both passes are told about a batch, and what has to stay alive meanwhile."""
    heads, head_dim = q.shape[-2:]
    if cu_seqlens is None:
        batch, length = q.shape[:2]
        statistics = (heads * length, length)
    else:
        batch, length = cu_seqlens.shape[0] - 1, max_seqlen
        statistics = (0, q.shape[0])
    if key_mask is not None and key_mask.stride(1) != 1:
        key_mask = key_mask.contiguous()
    mask = (0, 0) if key_mask is None else (key_mask.data_ptr(), key_mask.stride(0))
    entries = 0 if tiles is None else tiles.shape[0]
    packed = (pointer(cu_seqlens), pointer(tiles), entries, tile)
    seed_pointer = pointer(seed) if threshold else 0
    drops = (seed_pointer, dropout.keep_scale(threshold), min(threshold, 65535), site)
    return (mask, packed, drops, statistics, (batch, length, heads, head_dim)), key_mask


def forward(
    q, k, v, key_mask, cu_seqlens, tiles, tile, seed, max_seqlen, scale, threshold, site, out, lse
):
    """Fills out and, where it is given, lse. The last dimension of every tensor is dense."""
    q, k, v, written = _readable(q), _readable(k), _readable(v), _writable(out)
    batch, _alive = _batch(q, key_mask, cu_seqlens, tiles, tile, seed, max_seqlen, threshold, site)
    native.module_for(q).attention_forward(
        *(_rows(q), _rows(k), _rows(v), _rows(written), pointer(lse)),
        *(*batch, scale, DTYPE_TAG[q.dtype]),
        *native.place(q),
    )
    _give_back(written, out)


def backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    key_mask,
    cu_seqlens,
    tiles,
    tile,
    seed,
    max_seqlen,
    scale,
    threshold,
    site,
    dq,
    dk,
    dv,
):
    """Fills dq, dk and dv."""
    inputs = [_readable(x) for x in (dout, q, k, v, out)]
    grads = [_writable(x) for x in (dq, dk, dv)]
    batch, _alive = _batch(
        inputs[1], key_mask, cu_seqlens, tiles, tile, seed, max_seqlen, threshold, site
    )
    # lse and delta of each row, from the first kernel to the second.
    statistics = torch.empty((*lse.shape, 2), dtype=torch.float32, device=lse.device)
    native.module_for(q).attention_backward(
        *(_rows(x) for x in inputs),
        *(lse.data_ptr(), statistics.data_ptr()),
        *(_rows(x) for x in grads),
        *(*batch, scale, DTYPE_TAG[q.dtype]),
        *native.place(q),
    )
    for written, grad in zip(grads, (dq, dk, dv), strict=True):
        _give_back(written, grad)
