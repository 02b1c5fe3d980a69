"""Self-attention of one layer from the buffer that the joined product of q, k and v wrote: on full
batches and packed ones, against torch's own kernels and other libraries'."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ....ops import attention_qkv
from ....packing import plan
from ..case import normal
from ..models import Tokens, full_batch, mixed_batch
from ..op_case import Inputs, dropout_seed
from .attention import BASE, SDPA, AttentionCase, sdpa

LARGE, MINILM = (16, 64), (12, 32)  # heads and head_dim


class _ours:
    packed = True

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, qkv: torch.Tensor, p: float, **more: Any) -> torch.Tensor:
        return attention_qkv(qkv, dropout_p=p, backend=self.backend, **more)


def _sdpa(qkv: torch.Tensor, **more: Any) -> torch.Tensor:
    q, k, v = qkv.unbind(2)
    return sdpa(q, k, v, **more)


def _flex(attend: Callable, qkv: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """attend: torch's compiled flex_attention."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return attend(q, k, v).transpose(1, 2)


def _flash_attn(
    qkv: torch.Tensor,
    seed: torch.Tensor,
    p: float,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    plan: object = None,
) -> torch.Tensor:
    """The flash-attn package's kernels for one buffer."""
    import flash_attn

    if cu_seqlens is None:
        return flash_attn.flash_attn_qkvpacked_func(qkv, p)
    return flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, p)


_flash_attn.packed = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class AttentionQKVCase(AttentionCase):
    op = "attention_qkv"
    functions = {
        "bertfast": _ours,
        **{name: functools.partial(_sdpa, kernel=kernel) for name, kernel in SDPA.items()},
        "torch flex": _flex,
        "flash-attn": _flash_attn,
    }

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        rows, length = len(self.tokens.lengths), self.tokens.longest
        tail = (self.heads, self.head_dim)
        qkv, dout = values(rows, length, 3, *tail), values(rows, length, *tail)
        more = {"seed": dropout_seed(device, seed)}
        if not self.packed:
            return Inputs({"qkv": qkv}, dout, more)
        mask, bounds = self.tokens.mask(device), self.tokens.cu_seqlens(device)
        layout = {"cu_seqlens": bounds, "max_seqlen": length}
        layout["plan"] = plan(bounds, max_seqlen=length, total=self.tokens.real)
        packed = Inputs({"qkv": qkv[mask]}, dout[mask], more | layout)
        return Inputs({"qkv": qkv}, dout, more | {"mask": mask[:, None, None, :]}, packed)


_PASSES = (("forward", 0.0), ("training", 0.1), ("backward", 0.1), ("backward", 0.0))


def gpu_cases() -> list[AttentionQKVCase]:
    """BERT-base in bf16 at full lengths and packed, then outward."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    order: list[tuple[Tokens, tuple[int, int], torch.dtype]] = [
        (full_batch(32, 512), BASE, bf16),
        (mixed_batch("squad", 64), BASE, bf16),
        (full_batch(128, 128), BASE, bf16),
        (mixed_batch("queries", 512), BASE, bf16),
        (full_batch(64, 384), LARGE, fp16),
        (mixed_batch("wikipedia", 64), BASE, fp16),
        (full_batch(64, 384), MINILM, bf16),
        (mixed_batch("squad", 64), MINILM, bf16),
        (full_batch(1, 128), BASE, bf16),
        (full_batch(32, 512), BASE, fp32),
    ]
    return [
        AttentionQKVCase(pass_, tokens, *heads, dtype, p)
        for tokens, heads, dtype in order
        for pass_, p in _PASSES
    ]


def cpu_cases() -> list[AttentionQKVCase]:
    """MiniLM's heads."""
    batches = (full_batch(8, 128), mixed_batch("queries", 32), mixed_batch("squad", 8))
    return [AttentionQKVCase("forward", tokens, *MINILM, torch.float32) for tokens in batches]


def dry_cases() -> list[AttentionQKVCase]:
    """In dtypes that all backends take."""
    forms = 2 * ((full_batch(2, 20), torch.float16), (mixed_batch("queries", 2), torch.bfloat16))
    return [
        AttentionQKVCase(pass_, tokens, 1, 16, dtype, p)
        for (pass_, p), (tokens, dtype) in zip(_PASSES, forms, strict=True)
    ]
