"""What attention's arguments must be. Checked before anything is allocated."""

import torch

from ... import packing
from .. import checks


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype | None) -> None:
    """Shapes, device and dtype of three tensors (dtype None: each may have its own)."""
    checks.check_float("q", q)
    if q.ndim not in (3, 4):
        raise ValueError(
            "q must have shape [batch, length, heads, head_dim] or, packed, "
            f"[tokens, heads, head_dim], got {checks.shape(q)}"
        )
    _check_head("q", q)
    for name, tensor in (("k", k), ("v", v)):
        checks.check_like(name, tensor, q.shape, q.device, dtype, like="q")


def check_one_buffer(qkv: torch.Tensor) -> None:
    checks.check_float("qkv", qkv)
    if qkv.ndim not in (4, 5) or qkv.shape[-3] != 3:
        raise ValueError(
            "qkv must have shape [batch, length, 3, heads, head_dim] or, packed, "
            f"[tokens, 3, heads, head_dim], got {checks.shape(qkv)}"
        )
    _check_head("qkv", qkv)


def _check_head(name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] == 0 or tensor.shape[-2] == 0:
        raise ValueError(
            f"{name} must have heads and a head dimension of 1 or more, got {checks.shape(tensor)}"
        )


def check_layout(name, x, batch_shape, key_mask, cu_seqlens, max_seqlen, plan) -> None:
    """The arguments that say where sequences lie. batch_shape: (B, S), or (T,) if x is packed."""
    device = x.device
    if len(batch_shape) == 2:
        for other, value in (
            ("cu_seqlens", cu_seqlens),
            ("max_seqlen", max_seqlen),
            ("plan", plan),
        ):
            if value is not None:
                raise ValueError(
                    f"{other} must be None where {name} is padded, got {type(value).__name__}; "
                    f"{name} has shape {checks.shape(x)}"
                )
        if key_mask is not None:
            _check_key_mask(key_mask, batch_shape, device, name)
        return
    if key_mask is not None:
        raise ValueError(f"key_mask must be None where {name} is packed, got a tensor")
    _check_cu_seqlens(cu_seqlens, device, name)
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"max_seqlen must be an int, got {type(max_seqlen).__name__}")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must be 0 or more, got {max_seqlen}")
    if plan is not None:
        plan.check(cu_seqlens, max_seqlen)
    if packing.readable(cu_seqlens):
        if plan is None or plan.bounds is None:  # else its making has looked
            packing.check_bounds(cu_seqlens.tolist(), max_seqlen)
        last = cu_seqlens[-1].item()
        if last != batch_shape[0]:
            raise ValueError(
                f"cu_seqlens must end at {batch_shape[0]}, {name}'s tokens, got {last}"
            )


def _check_key_mask(key_mask, batch_shape, device, name) -> None:
    if not isinstance(key_mask, torch.Tensor):
        raise TypeError(f"key_mask must be a bool tensor, got {type(key_mask).__name__}")
    if key_mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask must have dtype torch.bool (True = attend), got {key_mask.dtype}"
        )
    if tuple(key_mask.shape) != tuple(batch_shape):
        expected = ", ".join(map(str, batch_shape))
        raise ValueError(f"key_mask must have shape [{expected}], got {checks.shape(key_mask)}")
    if key_mask.device != device:
        raise ValueError(f"key_mask must be on {device} (where {name} is), got {key_mask.device}")


def _check_cu_seqlens(cu_seqlens, device, name) -> None:
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(
            f"cu_seqlens must be an int32 tensor where {name} is packed, "
            f"got {type(cu_seqlens).__name__}"
        )
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must have dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens must have shape [sequences + 1], got {checks.shape(cu_seqlens)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(
            f"cu_seqlens must be on {device} (where {name} is), got {cu_seqlens.device}"
        )
