"""Checks of attention's arguments, before anything is allocated."""

import torch

from ... import checks, packing, tracing


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


def check_layout(
    name: str,
    x: torch.Tensor,
    batch_shape: torch.Size,
    key_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    plan: "packing.Plan | None",
) -> None:
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
                    f"{other} must be None where {name} is padded, got {checks.kind(value)}; "
                    f"{name} has shape {checks.shape(x)}"
                )
        if key_mask is not None:
            checks.check_mask("key_mask", key_mask, batch_shape, device, name)
        return
    if key_mask is not None:
        raise ValueError(f"key_mask must be None where {name} is packed, got a tensor")
    cu_seqlens = checks.check_cu_seqlens(cu_seqlens)
    checks.check_place("cu_seqlens", cu_seqlens, device, name)
    max_seqlen = checks.check_max_seqlen(max_seqlen)
    if plan is not None:
        if not isinstance(plan, packing.Plan):
            raise TypeError(
                f"plan must be what bertfast.packing.plan returns, got {checks.kind(plan)}"
            )
        plan.check(cu_seqlens, max_seqlen, batch_shape[0], name)
        if plan.bounds is not None:
            return  # its making has looked at the lengths
    if tracing.on_host(cu_seqlens):
        packing.check_bounds(cu_seqlens.tolist(), max_seqlen, batch_shape[0], f"{name}'s tokens")
