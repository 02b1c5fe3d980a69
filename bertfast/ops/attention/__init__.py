"""attention and attention_qkv: check, dispatch, autograd. The public functions.

Both are one computation; attention_qkv reads q, k and v in place in one buffer and writes their
gradients into one. The registered ops are in registered.py.
"""

import math
import operator

import torch

from ... import packing
from .. import checks, dispatch, dropout
from . import check, reference, registered


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
    if autocast:
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check.check_layout("q", q, q.shape[:-2], key_mask, cu_seqlens, max_seqlen, plan)
    seed, threshold, scale = _scalars("q", q, dropout_p, seed, site, scale)
    backend = _choose("attention", backend, q)
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
    if qkv.dtype != torch.float64 and dispatch.autocast_enabled(device_type):
        qkv = qkv.to(torch.get_autocast_dtype(device_type))
    check.check_layout("qkv", qkv, qkv.shape[:-3], key_mask, cu_seqlens, max_seqlen, plan)
    seed, threshold, scale = _scalars("qkv", qkv, dropout_p, seed, site, scale)
    backend = _choose("attention_qkv", backend, qkv)
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


def _scalars(name, x, dropout_p, seed, site, scale):
    """The seed if there is dropout, its threshold, and the scale."""
    checks.check_dropout(dropout_p, site)
    threshold = dropout.threshold(dropout_p)
    if seed is not None:
        checks.check_seed(seed, x.device, like=name)
    elif threshold:
        seed = dropout.draw_seed(x.device)
    if scale is None:
        scale = 1.0 / math.sqrt(operator.index(x.shape[-1]))
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    return seed if threshold else None, threshold, float(scale)


def _choose(op: str, backend: str, x: torch.Tensor) -> str:
    # Under torch.compile(dynamic=True) too, the head dimension is a constant.
    return dispatch.choose(op, backend, x.device.type, x.dtype, operator.index(x.shape[-1]))
