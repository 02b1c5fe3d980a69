"""attention and attention_qkv: check, dispatch, autograd. The public functions.

Both are one computation; attention_qkv reads q, k and v in place in one buffer and writes their
gradients into one. The registered ops are in registered.py.
"""

import math
import operator

import torch

from ... import checks, packing
from .. import dispatch, dropout
from . import check, limits, reference, registered


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    plan: "packing.Plan | None" = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    site: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """dropout(softmax(scale * q k^T)) v for each head of each sequence; scale 1/sqrt(head_dim).

    Padded: q, k, v are (batch, length, heads, head_dim), and key_mask, bool (batch, length), says
    which keys are attended. It masks keys only: the queries at masked positions are computed too.
    Packed: q, k, v are (tokens, heads, head_dim), and sequence b's are cu_seqlens[b] to
    cu_seqlens[b + 1], int32 from 0 to tokens; max_seqlen is the longest length or more. plan, from
    `bertfast.packing.plan`, saves work where many layers see one batch or sequences are short.

    A query without any key gives zeros, and so do its gradients. Nothing at masked keys and values
    gets out, NaN neither. Under autocast the inputs are cast as scaled_dot_product_attention's are.

    The dropout mask is a function of (seed, site, batch, head, query, key), the latter two counted
    from the sequence's first token: of a padded row, from its first attended key. seed is an int64
    tensor with one element on q's device, drawn from torch's generator if it is None. The caller
    decides about training: dropout_p = 0 means none.

    backend: "auto", "torch", "triton" or "cuda"; an explicit one that can't run here raises
    ValueError.
    """
    checks.check_float("q", q)
    device_type = q.device.type
    autocast = q.dtype != torch.float64 and dispatch.autocast_enabled(device_type)
    check.check_qkv(q, k, v, None if autocast else q.dtype)
    check.check_layout("q", q, q.shape[:-2], key_mask, cu_seqlens, max_seqlen, plan)
    scale = _check_scalars("q", q, dropout_p, seed, site, scale)
    dtype = torch.get_autocast_dtype(device_type) if autocast else q.dtype
    backend = _choose("attention", backend, q, dtype, key_mask, cu_seqlens, max_seqlen)

    if autocast:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    seed, threshold = _draws(q, dropout_p, seed)
    if backend == "torch" or dispatch.only_reference():
        runs = None if plan is None else plan.runs
        return reference.forward(
            q, k, v, key_mask, cu_seqlens, max_seqlen, seed, threshold, site, scale, runs
        )
    tiles, tile = (None, 0) if plan is None else (plan.tiles, plan.tile)
    layout = (key_mask, cu_seqlens, tiles, tile, seed)
    constants = (max_seqlen or 0, scale, threshold, site, backend)
    plain = dispatch.plain_call(q, k, v, key_mask, cu_seqlens, tiles, seed)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if not plain:
            q, k, v = dispatch.distinct((q, k, v))
        apply = registered.apply_plain if plain else registered.Attention.apply
        return apply(q, k, v, *layout, *constants, plain)
    infer = registered.infer_impl if plain else registered.infer
    return infer(q, k, v, *layout, *constants)


def attention_qkv(
    qkv: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    plan: "packing.Plan | None" = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    site: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """attention of the three parts of one buffer, which are read in place.

    qkv is (batch, length, 3, heads, head_dim) or packed (tokens, 3, heads, head_dim); its gradient
    is one buffer too. Everything else is as in `attention`.
    """
    check.check_one_buffer(qkv)
    device_type = qkv.device.type
    autocast = qkv.dtype != torch.float64 and dispatch.autocast_enabled(device_type)
    check.check_layout("qkv", qkv, qkv.shape[:-3], key_mask, cu_seqlens, max_seqlen, plan)
    scale = _check_scalars("qkv", qkv, dropout_p, seed, site, scale)
    dtype = torch.get_autocast_dtype(device_type) if autocast else qkv.dtype
    backend = _choose("attention_qkv", backend, qkv, dtype, key_mask, cu_seqlens, max_seqlen)

    if autocast:
        qkv = qkv.to(dtype)
    seed, threshold = _draws(qkv, dropout_p, seed)
    if backend == "torch" or dispatch.only_reference():
        parts = qkv.unbind(-3)
        return reference.forward(
            *parts,
            key_mask,
            cu_seqlens,
            max_seqlen,
            seed,
            threshold,
            site,
            scale,
            None if plan is None else plan.runs,
        )
    tiles, tile = (None, 0) if plan is None else (plan.tiles, plan.tile)
    layout = (key_mask, cu_seqlens, tiles, tile, seed)
    constants = (max_seqlen or 0, scale, threshold, site, backend)
    plain = dispatch.plain_call(qkv, key_mask, cu_seqlens, tiles, seed)
    if torch.is_grad_enabled() and qkv.requires_grad:
        apply = registered.apply_qkv_plain if plain else registered.AttentionQKV.apply
        return apply(qkv, *layout, *constants, plain)
    infer = registered.infer_qkv_impl if plain else registered.infer_qkv
    return infer(qkv, *layout, *constants)


def _check_scalars(name, x, dropout_p, seed, site, scale) -> float:
    """The scale."""
    checks.check_dropout(dropout_p, site)
    if seed is not None:
        checks.check_seed(seed, x.device, like=name)
    if scale is None:
        return 1.0 / math.sqrt(operator.index(x.shape[-1]))
    checks.check_number("scale", scale)
    return float(scale)


def _draws(x, dropout_p, seed) -> tuple[torch.Tensor | None, int]:
    """The seed if there is dropout, and its threshold."""
    threshold = dropout.threshold(dropout_p)
    if not threshold:
        return None, 0
    return dropout.draw_seed(x.device) if seed is None else seed, threshold


def _choose(op: str, backend: str, x, dtype, key_mask, cu_seqlens, max_seqlen) -> str:
    # Under torch.compile(dynamic=True) too, the head dimension is a constant.
    case = (x.device.type, dtype, operator.index(x.shape[-1]))
    if torch.compiler.is_compiling():  # a size that is looked at is a size that can't change
        return dispatch.choose(op, backend, *case)
    sequences, length = x.shape[:2]
    if cu_seqlens is not None:
        sequences, length = cu_seqlens.shape[0] - 1, min(max_seqlen, x.shape[0])
    size = limits.unusual(sequences, x.shape[-2], length, key_mask is not None)
    return dispatch.choose(op, backend, *case, size)
