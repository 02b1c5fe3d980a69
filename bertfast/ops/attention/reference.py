"""out = dropout(softmax(scores)) v over each sequence's attended keys, in torch.

Runs in float32 for 16-bit inputs and rounds once, at the output; float64 stays float64, which makes
it the oracle of every test. On a CPU it is also what `backend="auto"` runs: without dropout through
torch's fused attention, which stores no probabilities; a packed batch sequence by sequence,
neighbours of one length in one call; with a window or a bias some queries at a time, so that no
mask of all queries by all keys is made.

Masked keys and values are zeroed first, so nothing that lies there gets out, NaN neither; so are
queries without any key: they attend to zeros only and are zero themselves, as are their gradients.
"""

import torch
import torch.nn.functional as F

from ... import packing, tracing
from .. import dropout
from ..dropout import Dropout
from .scores import Block, Scores, bias_matrix, blocks, rotated, seen, sees_any

_STEP = 256  # queries at a time, with a window or a bias


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: packing.Sequences,
    scores: Scores,
    drop: Dropout,
) -> torch.Tensor:
    """Padded (B, S, H, D) or packed (T, H, D)."""
    if (scores.bias is not None or drop.seed is not None) and tracing.autocast(q) is not None:
        # It would round scores, or their bias, to 16 bits: exp makes of that a large error.
        with torch.autocast(q.device.type, enabled=False):
            return forward(q, k, v, sequences, scores, drop)
    key_mask, cu_seqlens, max_seqlen = sequences[:3]
    dtype = q.dtype
    compute = dtype if dtype == torch.float64 else torch.float32
    q, k, v = (tensor.to(compute) for tensor in (q, k, v))
    if cu_seqlens is None:
        out = _padded(q, k, v, key_mask, scores, drop)
    elif cu_seqlens.device.type != "cpu" or tracing.is_compiling():
        out = _through_padding(q, k, v, cu_seqlens, max_seqlen, scores, drop)
    else:
        runs = sequences.runs
        if runs is None:
            runs = packing.equal_runs(cu_seqlens.tolist())
        out = _by_runs(q, k, v, runs, scores, drop)
    if q.numel() == 0 and scores.bias is not None:
        out = out + 0.0 * scores.bias.sum()  # a gradient of zeros
    return out.to(dtype)


def of_all_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
    """forward of a padded batch without dropout and mask, in the tensors' own dtype."""
    if q.numel() == 0:
        return q * 1.0 + 0.0 * (k + v)
    if scores.cos is not None and scores.sin is not None:
        q, k = rotated(q, k, scores.cos, scores.sin)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scores.scale).transpose(1, 2)


def _padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    scores: Scores,
    drop: Dropout,
    sequence: int = 0,
) -> torch.Tensor:
    """sequence: the number of the first one, for dropout."""
    fused = drop.seed is None and not tracing.only_reference()  # without dropout, or torch draws
    if fused and key_mask is None and not drop.threshold and scores.all_seen:
        return of_all_keys(q, k, v, scores)
    if q.numel() == 0:
        return q * 1.0 + 0.0 * (k + v)
    any_key = None
    if key_mask is not None:
        if scores.windowed:
            any_key = sees_any(key_mask, scores)
        else:
            any_key = key_mask.any(1, keepdim=True)
        q = q.masked_fill(~any_key[:, :, None, None], 0.0)
        k = k.masked_fill(~key_mask[:, :, None, None], 0.0)
        v = v.masked_fill(~key_mask[:, :, None, None], 0.0)
    if scores.cos is not None and scores.sin is not None:
        q, k = rotated(q, k, scores.cos, scores.sin)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    length = q.shape[2]
    whole = Block(0, length, 0, length)
    if fused:
        p = drop.threshold / 65536
        in_parts = scores.windowed or scores.bias is not None
        in_parts = in_parts and not tracing.is_compiling()
        at_a_time = blocks(length, _STEP, scores) if in_parts else [whole]
        queries = q.split(_STEP, 2) if in_parts else (q,)
        outs = []
        for block, some in zip(at_a_time, queries, strict=True):
            keys, values = (x[:, :, block.start : block.end] for x in (k, v))
            mask = _mask(key_mask, any_key, scores, block, q)
            outs.append(
                F.scaled_dot_product_attention(
                    *(some, keys, values, mask), dropout_p=p, scale=scores.scale
                )
            )
        return (outs[0] if len(outs) == 1 else torch.cat(outs, 2)).transpose(1, 2)
    found = q @ k.transpose(-1, -2) * scores.scale
    mask = _mask(key_mask, any_key, scores, whole, q)
    if mask is not None:
        found = found + mask if scores.bias is not None else found.masked_fill(~mask, -torch.inf)
    probabilities = found.softmax(-1)
    if drop.threshold and drop.seed is None:
        probabilities = F.dropout(probabilities, drop.threshold / 65536)
    elif drop.threshold and drop.seed is not None:
        # The mask counts from a sequence's first token, wherever that lies in the padded row.
        start = None if key_mask is None else key_mask.int().argmax(1)
        keep = dropout.attention_keep_mask(
            drop.seed, drop.site, found.shape, drop.threshold, start, sequence
        )
        probabilities = torch.where(keep, probabilities * drop.scale, 0.0)
    return (probabilities @ v).transpose(1, 2)


def _mask(
    key_mask: torch.Tensor | None,
    any_key: torch.Tensor | None,
    scores: Scores,
    block: Block,
    q: torch.Tensor,
) -> torch.Tensor | None:
    """The keys that a block's queries see, as booleans, or where there is a bias as what is added
    to their scores. any_key: (B, S or 1), the queries that see one; others see all zeros around
    them."""
    mask = None
    if scores.windowed:
        mask = seen(block, scores, q.device)
    if key_mask is not None and any_key is not None:
        own = any_key[:, block.first : block.last] if any_key.shape[1] > 1 else any_key
        keys = key_mask[:, None, None, block.start : block.end] | ~own[:, None, :, None]
        mask = keys if mask is None else keys & mask
    if scores.bias is None:
        return mask
    bias = bias_matrix(scores.bias, block).to(q.dtype)[None]
    return bias if mask is None else torch.where(mask, bias, -torch.inf)


def _by_runs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    runs: "tuple[packing.Run, ...]",
    scores: Scores,
    drop: Dropout,
) -> torch.Tensor:
    """Sequences of one length that are neighbours are one padded batch without padding."""
    outs = []
    # Not by slices: the backward of each would fill a gradient of all tokens.
    sizes = [run.count * run.length for run in runs]
    parts = zip(*(tensor.split(sizes) for tensor in (q, k, v)), strict=True) if runs else ()
    for run, part in zip(runs, parts, strict=True):
        shape = (run.count, run.length)
        q_run, k_run, v_run = (tensor.unflatten(0, shape) for tensor in part)
        out = _padded(q_run, k_run, v_run, None, scores, drop, run.sequence)
        outs.append(out.flatten(0, 1))
    if not outs:
        return q * 1.0 + 0.0 * (k + v)
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _through_padding(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scores: Scores,
    drop: Dropout,
) -> torch.Tensor:
    """Every sequence as a row of a padded batch: no length is read on the host."""
    tokens, cu = q.shape[0], cu_seqlens.to(torch.int64)
    if tokens == 0:
        return q * 1.0 + 0.0 * (k + v)
    position = torch.arange(max_seqlen, device=q.device)
    key_mask = position < (cu[1:] - cu[:-1])[:, None]
    index = (cu[:-1, None] + position).clamp(max=tokens - 1)
    # Beyond a sequence's end lie its neighbours' tokens, in whose gradients a NaN would be no zero.
    outside = ~key_mask[:, :, None, None]
    q, k, v = (tensor[index].masked_fill(outside, 0.0) for tensor in (q, k, v))
    out = _padded(q, k, v, key_mask, scores, drop)
    token = torch.arange(tokens, device=q.device)
    row = torch.searchsorted(cu[1:].contiguous(), token, right=True).clamp(max=cu.shape[0] - 2)
    return out[row, token - cu[row]]
