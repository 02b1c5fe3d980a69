"""attention and attention_qkv: check, dispatch, autograd. The public functions.

Both are one computation; attention_qkv reads q, k and v in place in one buffer and writes their
gradients into one. The registered ops are in registered.py.
"""

import operator

import torch

from ... import checks, packing, tracing
from .. import dispatch, dropout
from ..registration import any_requires_grad, distinct
from . import check, limits, reference, registered
from .scores import Scores

__all__ = ["attention", "attention_qkv"]


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
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    window: tuple[int, int] | None = None,
    distance_bias: torch.Tensor | None = None,
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

    Where a query and a key lie may count. A position is that in its sequence, or in a padded row.
    rotary, (cos, sin), float32 (positions, head_dim / 2) each, rotates q and k first: the halves of
    a head, x1 and x2, become x1 cos - x2 sin and x2 cos + x1 sin, in float32, rounded once. No
    gradient is computed for the tables.
    window, (left, right): a query sees the keys from `left` before it to `right` behind it. So
    (2**30, 0) is a causal mask, and one that holds whole sequences is none.
    distance_bias, (heads, 2 * reach + 1), of finite numbers, is added to scale * q k^T, and has a
    gradient: the bias of a distance, key - query, is at distance + reach; greater distances have
    the first one or the last. T5's buckets become one by `bucket_bias`; ALiBi's is slope *
    -abs(distance).

    backend: "auto", "torch", "triton" or "cuda"; an explicit one that can't run here raises
    ValueError.
    """
    checks.check_float("q", q)
    cast = tracing.autocast(q)
    check.check_qkv(q, k, v, q.dtype if cast is None else None)
    check.check_layout("q", q, q.shape[:-2], key_mask, cu_seqlens, max_seqlen, plan)
    _check_dropout("q", q, dropout_p, seed, site)
    longest = q.shape[1] if max_seqlen is None else max_seqlen
    scores = check.check_scores("q", q, longest, scale, rotary, window, distance_bias)
    layout = (key_mask, cu_seqlens, max_seqlen)
    requested = backend
    asked = _asked(scores, q, k, v)
    backend = _choose("attention", backend, q, cast or q.dtype, *layout, asked)

    if cast is not None:
        q, k, v = q.to(cast), k.to(cast), v.to(cast)
    if requested == "auto" and dropout.may_be_torchs(backend, q.device, dropout_p, seed):
        drop = dropout.torchs(dropout_p)
    else:
        drop = dropout.dropout_of(dropout_p, seed, site, q.device)
    if backend == "torch" or tracing.only_reference():
        sequences = packing.sequences_of(*layout, plan, q.shape[0])
        return reference.forward(q, k, v, sequences, scores, drop)
    rest = _flat(*layout, plan, drop, scores, backend)
    plain = tracing.plain_call(q, k, v, *rest[:3], drop.seed, *scores[1:4])
    if any_requires_grad(q, k, v, scores.bias):
        if plain:
            return registered.apply_plain(q, k, v, *rest, plain)
        return registered.Attention.apply(*distinct((q, k, v)), *rest, plain)
    return registered.infer.call(plain)(q, k, v, *rest)


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
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    window: tuple[int, int] | None = None,
    distance_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """attention of the three parts of one buffer, which are read in place.

    qkv is (batch, length, 3, heads, head_dim) or packed (tokens, 3, heads, head_dim); its gradient
    is one buffer too. Everything else is as in `attention`.
    """
    check.check_one_buffer(qkv)
    check.check_layout("qkv", qkv, qkv.shape[:-3], key_mask, cu_seqlens, max_seqlen, plan)
    _check_dropout("qkv", qkv, dropout_p, seed, site)
    longest = qkv.shape[1] if max_seqlen is None else max_seqlen
    scores = check.check_scores("qkv", qkv, longest, scale, rotary, window, distance_bias)
    cast = tracing.autocast(qkv)
    layout = (key_mask, cu_seqlens, max_seqlen)
    requested = backend
    asked = _asked(scores, qkv)
    backend = _choose("attention_qkv", backend, qkv, cast or qkv.dtype, *layout, asked)

    if cast is not None:
        qkv = qkv.to(cast)
    if requested == "auto" and dropout.may_be_torchs(backend, qkv.device, dropout_p, seed):
        drop = dropout.torchs(dropout_p)
    else:
        drop = dropout.dropout_of(dropout_p, seed, site, qkv.device)
    if backend == "torch" or tracing.only_reference():
        sequences = packing.sequences_of(*layout, plan, qkv.shape[0])
        q, k, v = qkv.unbind(-3)
        return reference.forward(q, k, v, sequences, scores, drop)
    rest = _flat(*layout, plan, drop, scores, backend)
    plain = tracing.plain_call(qkv, *rest[:3], drop.seed, *scores[1:4])
    if any_requires_grad(qkv, scores.bias):
        apply = registered.apply_qkv_plain if plain else registered.AttentionQKV.apply
        return apply(qkv, *rest, plain)
    return registered.infer_qkv.call(plain)(qkv, *rest)


def _flat(
    key_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    plan: "packing.Plan | None",
    drop: dropout.Dropout,
    scores: Scores,
    backend: str,
) -> tuple:
    """The arguments of a registered op after q, k and v, one by one."""
    tiles, tile = (None, 0) if plan is None else (plan.tiles, plan.tile)
    layout = (key_mask, cu_seqlens, tiles, tile, drop.seed, max_seqlen or 0)
    return (*layout, scores.scale, drop.threshold, drop.site, backend, *scores.parts)


def _check_dropout(
    name: str, x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None, site: int
) -> None:
    checks.check_dropout(dropout_p, site)
    if seed is not None:
        checks.check_seed(seed, x.device, like=name)


def _asked(scores: Scores, *heads: torch.Tensor) -> tuple[str, ...]:
    """Features that a call by position needs of a backend; none of any other call."""
    features = scores.features
    if features and any_requires_grad(*heads, scores.bias):
        return (*features, limits.BACKWARD)
    return features


def _choose(
    op: str,
    backend: str,
    x: torch.Tensor,
    dtype: torch.dtype,
    key_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    features: tuple[str, ...],
) -> str:
    # Under torch.compile(dynamic=True) too, the head dimension is a constant.
    case = (x.device, dtype, operator.index(x.shape[-1]))
    if tracing.is_compiling():  # a size that is looked at is a size that can't change
        return dispatch.choose(op, backend, *case, *((None, features) if features else ()))
    sequences, length = x.shape[:2]
    longest = length
    if cu_seqlens is not None:
        sequences, longest = 1, max_seqlen or 0
        length = limits.packed_length(x.shape[0], cu_seqlens.shape[0] - 1)
    size = limits.size_of(sequences, x.shape[-2], length, key_mask is not None, longest)
    return dispatch.choose(op, backend, *case, size, *((features,) if features else ()))
