"""attn_implementation="bertfast": the attention alone, by transformers' own interface.

    import bertfast.hf
    model = AutoModel.from_pretrained(..., attn_implementation="bertfast")

It is for models that `bertfast.optimize` doesn't know, and complete by itself. The mask stays 2-D,
so no (length x length) mask is ever made, and nothing looks at its values: it goes through
fullgraph and export. Inputs that come packed, with cu_seq_lens_q, are attended sequence by
sequence. A call that needs more (causal attention, keys of another length, masks of its own,
grouped heads, a bias) goes to transformers' "sdpa".
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from .. import ops, tracing

NAME = "bertfast"  # not with "flash" in it, by which transformers and others take it for another
_KEPT = "_bertfast_longest"  # of a tensor: its version, and the longest sequence that it tells
# Arguments of an attention function that change nothing here.
_HARMLESS = frozenset(
    ("position_ids", "cache_position", "encoder_hidden_states", "output_hidden_states")
    + ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
    + ("use_cache", "is_causal", "num_items_in_batch", "return_dict", "encoder_attention_mask")
)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key and value: (batch, heads, length, head_dim). Returns (batch, length, heads,
    head_dim), and no attention weights."""
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if not _is_ours(module, query, key, value, attention_mask, kwargs):
        if cu_seqlens is not None:
            raise ValueError(
                'attn_implementation="bertfast" takes packed inputs only for bidirectional '
                "self-attention without a mask"
            )
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if cu_seqlens is None:
        out = ops.attention(q, k, v, key_mask=attention_mask, dropout_p=dropout, scale=scaling)
        return out, None
    if q.shape[0] != 1:
        raise ValueError(f"inputs with cu_seq_lens_q must have one row, got {q.shape[0]}")
    longest: Any = kwargs.get("max_length_q")
    if longest is None or isinstance(longest, torch.Tensor):
        longest = _longest(cu_seqlens, longest)
    out = ops.attention(
        *(q[0], k[0], v[0]),
        cu_seqlens=cu_seqlens.to(q.device, torch.int32, non_blocking=True),
        max_seqlen=longest,
        dropout_p=dropout,
        scale=scaling,
    )
    return out[None], None


def _longest(cu_seqlens: torch.Tensor, longest: torch.Tensor | None) -> int:
    """The longest sequence's length. The host waits for it in the first layer only: the tensor that
    all layers are given then keeps it, for as long as nobody writes to it."""
    source = cu_seqlens if longest is None else longest
    counted = not (tracing.is_compiling() or source.is_inference())  # its changes are counted
    kept = getattr(source, _KEPT, None) if counted else None
    if kept is not None and kept[0] == source._version:
        return kept[1]
    found: Any = (cu_seqlens.diff().max() if longest is None else longest).item()
    if counted:
        setattr(source, _KEPT, (source._version, found))
    return found


def _is_ours(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> bool:
    causal = kwargs.get("is_causal")
    if causal if causal is not None else getattr(module, "is_causal", False):
        return False
    if attention_mask is not None and (
        attention_mask.ndim != 2
        or attention_mask.dtype != torch.bool
        or kwargs.get("cu_seq_lens_q") is not None
    ):
        return False
    if query.shape != key.shape or query.shape != value.shape:
        return False
    return all(
        given is None or given is False or name in _HARMLESS for name, given in kwargs.items()
    )


def mask(
    *,
    kv_length: int,
    mask_function: Callable = bidirectional_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The 2-D mask itself, bool (batch, length); for any other pattern sdpa's mask."""
    if mask_function is bidirectional_mask_function:
        return None if attention_mask is None else attention_mask[:, -kv_length:]
    return sdpa_mask(
        kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
