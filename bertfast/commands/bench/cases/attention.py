"""Self-attention of one layer from q, k and v as three tensors, on a full batch."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ....ops import attention
from ....testing import attention as testing
from ..case import normal
from ..floor import Work
from ..floor import attention as attention_work
from ..models import Tokens, full_batch
from ..op_case import Inputs, OpCase, dropout_seed

BASE = (12, 64)  # BERT-base's heads and head_dim
# torch's kernels by the names of their providers; None is torch's own choice.
SDPA = {
    "torch sdpa": None,
    "torch sdpa flash": SDPBackend.FLASH_ATTENTION,
    "torch sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch sdpa math": SDPBackend.MATH,
}


def _ours(backend: str) -> Callable:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float, **more: Any) -> Any:
        return attention(q, k, v, dropout_p=p, backend=backend, **more)

    return run


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor,
    p: float,
    mask: torch.Tensor | None = None,
    kernel: SDPBackend | None = None,
) -> torch.Tensor:
    """By one of torch's kernels, or by torch's own choice."""
    call = functools.partial(F.scaled_dot_product_attention, attn_mask=mask, dropout_p=p)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if kernel is None:
        return call(q, k, v).transpose(1, 2)
    with sdpa_kernel(kernel):
        return call(q, k, v).transpose(1, 2)


@dataclass(frozen=True)
class AttentionCase(OpCase):
    pass_: str
    tokens: Tokens
    heads: int
    head_dim: int
    dtype: torch.dtype
    dropout: float = 0.0

    op = "attention"
    functions = {
        "bertfast": _ours,
        **{name: functools.partial(sdpa, kernel=kernel) for name, kernel in SDPA.items()},
    }
    stock = "torch sdpa"

    @property
    def packed(self) -> bool:
        """True for a batch with padding: a function marked `packed` gets its tokens without, any
        other gets a mask."""
        return self.tokens.real < self.tokens.padded

    @property
    def masked(self) -> bool:
        """True where a function that isn't marked `packed` gets a mask."""
        return self.packed

    @property
    def biased(self) -> bool:
        """True where scores have a bias by distance."""
        return False

    @property
    def shape(self) -> str:
        return f"{self.tokens.name}x{self.heads}x{self.head_dim}"

    @property
    def form(self) -> tuple:
        return self.dtype, self.head_dim

    def options(self) -> dict[str, float]:
        return {"p": self.dropout}

    def work(self) -> list[Work]:
        """lse is written in training and read in the backward: 4 bytes per row and head."""
        width = self.heads * self.head_dim
        backward = self.pass_ == "backward"
        least = attention_work(self.tokens.lengths, width, self.dtype.itemsize, backward)
        statistics = 0 if self.pass_ == "forward" else 4 * self.tokens.real * self.heads
        return [Work("attention", least.flops, least.bytes + statistics)]

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        shape = (len(self.tokens.lengths), self.tokens.longest, self.heads, self.head_dim)
        leaves = {name: values(*shape) for name in "qkv"}
        return Inputs(leaves, values(*shape), {"seed": dropout_seed(device, seed)})

    def for_budget(self) -> testing.Case:
        return testing.Case(
            (33, 70),
            self.heads,
            self.head_dim,
            packed=self.packed,
            plan=self.packed,
            p=self.dropout,
        )


def gpu_cases() -> list[AttentionCase]:
    order = (("forward", 0.0), ("backward", 0.1))
    full = full_batch(32, 512)
    return [AttentionCase(pass_, full, *BASE, torch.bfloat16, p) for pass_, p in order]


def cpu_cases() -> list[AttentionCase]:
    return []


def dry_cases() -> list[AttentionCase]:
    order = (("forward", torch.float16), ("backward", torch.bfloat16))
    return [AttentionCase(pass_, full_batch(2, 20), 1, 16, dtype) for pass_, dtype in order]
