"""What is timed for attention: full batches and packed ones, against torch's own and others'.

On a packed case, providers that can't take packed tokens get the same tokens padded, with a mask.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import ops, packing
from ...testing import attention as attention_testing
from .lengths import MIXES
from .stepping import Step, ours_and, step

# torch's kernels, by the names that people know them by; "default" is torch's own choice.
SDPA = {
    "torch sdpa": None,
    "torch sdpa flash": SDPBackend.FLASH_ATTENTION,
    "torch sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch sdpa math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class AttentionCase:
    """Self-attention of one layer, from the buffer that the joined product of q, k and v wrote."""

    pass_: str  # forward (inference), training (forward, saving for the backward), backward
    batch: int
    length: int  # of every sequence; of a mix the most there can be
    heads: int
    head_dim: int
    dtype: torch.dtype
    dropout: float = 0.0
    mix: str | None = None
    op: str = "attention_qkv"

    @functools.cached_property
    def lengths(self) -> list[int]:
        return MIXES[self.mix].lengths(self.batch) if self.mix else [self.length] * self.batch

    @property
    def shape(self) -> str:
        size = f"{self.batch}x{max(self.lengths)}x{self.heads}x{self.head_dim}"
        return f"{self.mix} {size}" if self.mix else size

    @property
    def bytes(self) -> int:
        """q, k, v read and out written; its gradient, those four and three gradients. And lse."""
        rows = sum(self.lengths) * self.heads
        values = 8 if self.pass_ == "backward" else 4
        statistics = 0 if self.pass_ == "forward" else 4 * rows
        return values * rows * self.head_dim * self.dtype.itemsize + statistics

    @property
    def flops(self) -> int:
        """Two products in the forward, five in the backward, each 2 * head_dim a score."""
        scores = self.heads * sum(length * length for length in self.lengths)
        return (10 if self.pass_ == "backward" else 4) * self.head_dim * scores

    def inputs(self, device: str, seed: int) -> dict:
        generator = torch.Generator(device).manual_seed(seed)
        rows, length = self.batch, max(self.lengths)
        tail = (self.heads, self.head_dim)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(self.dtype)

        padded, dout = normal(rows, length, 3, *tail), normal(rows, length, *tail)
        found = {"qkv": padded, "dout": dout, "mask": None, "layout": {}}
        found["seed"] = torch.tensor([seed + 12345], device=device)
        if self.mix:
            own = torch.tensor(self.lengths)
            mask = (torch.arange(length) < own[:, None]).to(device)
            cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32)
            cu_seqlens[1:] = own.cumsum(0)
            cu_seqlens = cu_seqlens.to(device)
            plan = packing.plan(cu_seqlens, length, int(own.sum()))
            layout = dict(cu_seqlens=cu_seqlens, max_seqlen=length, plan=plan)
            found |= {"mask": mask, "layout": layout}
            found |= {"packed_qkv": padded[mask], "packed_dout": dout[mask]}
        return found

    def steps(self, function: Callable, inputs: dict) -> Step:
        """The pass as a function without arguments; `function` is one of `providers`."""
        form = "packed_" if self.mix and getattr(function, "packed", False) else ""
        p = 0.0 if self.pass_ == "forward" else self.dropout
        call = functools.partial(function, inputs=inputs, p=p)
        return step(self.pass_, call, {"qkv": inputs[form + "qkv"]}, inputs[form + "dout"])

    def providers(self, device: str, compile_backend: str = "inductor") -> dict[str, Callable]:
        case = (self.dtype, self.head_dim)
        found = ours_and(self.op, _ours, device, case=case)
        names = SDPA if device == "cuda" else ("torch sdpa", "torch sdpa math")
        found |= {name: functools.partial(_sdpa, SDPA[name]) for name in names}
        if self.mix and device == "cuda":  # flash refuses masks
            del found["torch sdpa flash"]
        if device == "cuda" and not self.mix and not self.dropout:
            found["torch flex"] = _flex(compile_backend)
        flash = _flash_attn(device, self.dtype)
        return found | ({"flash-attn": flash} if flash else {})

    def reference(self, inputs: dict, provider: str) -> Step:
        """What is right, in float64 on the inputs' device."""
        wide = {
            name: value.double() if name.endswith(("qkv", "dout")) else value
            for name, value in inputs.items()
        }
        packed = provider.startswith(("bertfast", "flash-attn"))
        return self.steps(_ours("torch") if packed else functools.partial(_sdpa, None), wide)

    def without_dropout(self) -> "AttentionCase":
        """To check others, whose own random mask can't be known."""
        return dataclasses.replace(self, dropout=0.0)

    def for_budget(self) -> attention_testing.Case:
        """A few tokens of it, for the error budget."""
        packed = bool(self.mix)
        return attention_testing.Case(
            (33, 70), self.heads, self.head_dim, packed=packed, plan=packed, p=self.dropout
        )


class _ours:
    packed = True

    def __init__(self, backend: str):
        self.backend = backend

    def __call__(self, qkv, inputs, p):
        return ops.attention_qkv(
            qkv, **inputs["layout"], dropout_p=p, seed=inputs["seed"], backend=self.backend
        )


def _sdpa(backend, qkv, inputs, p):
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    mask = inputs["mask"]
    mask = None if mask is None else mask[:, None, None, :]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, mask, p).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, mask, p).transpose(1, 2)


def _flex(compile_backend: str) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False, backend=compile_backend)

    def run(qkv, inputs, p):
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return compiled(q, k, v).transpose(1, 2)

    return run


def _flash_attn(device: str, dtype: torch.dtype) -> Callable | None:
    """The flash-attn package's kernels for one buffer, if it is installed."""
    if device != "cuda" or dtype == torch.float32:
        return None
    try:
        import flash_attn
    except ImportError:
        return None

    def run(qkv, inputs, p):
        layout = inputs["layout"]
        if not layout:
            return flash_attn.flash_attn_qkvpacked_func(qkv, p)
        return flash_attn.flash_attn_varlen_qkvpacked_func(
            qkv, layout["cu_seqlens"], layout["max_seqlen"], p
        )

    run.packed = True  # type: ignore[attr-defined]
    return run


_PASSES = (("forward", 0.0), ("training", 0.1), ("backward", 0.1), ("backward", 0.0))
_BASE, _LARGE, _MINILM = (12, 64), (16, 64), (12, 32)


def attention_cases() -> list[AttentionCase]:
    """Most important first: BERT-base in bf16 at full lengths and packed, then outward."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    order = [
        (32, 512, _BASE, bf16, None),
        (64, 384, _BASE, bf16, "squad"),
        (128, 128, _BASE, bf16, None),
        (512, 128, _BASE, bf16, "queries"),
        (64, 384, _LARGE, fp16, None),
        (64, 512, _BASE, fp16, "wikipedia"),
        (64, 384, _MINILM, bf16, None),
        (64, 384, _MINILM, bf16, "squad"),
        (1, 128, _BASE, bf16, None),
        (32, 512, _BASE, fp32, None),
    ]
    return [
        AttentionCase(pass_, batch, length, *heads, dtype, p, mix)
        for batch, length, heads, dtype, mix in order
        for pass_, p in _PASSES
    ]


def dry_attention_cases() -> list[AttentionCase]:
    """One tiny case a pass, in dtypes that all backends take: the interpreter is slow."""
    dtypes = (torch.float16, torch.bfloat16, torch.float16, torch.bfloat16)
    return [
        AttentionCase(pass_, 2, 20, 1, 16, dtype, p, mix)
        for (pass_, p), dtype, mix in zip(
            _PASSES, dtypes, (None, "queries", None, "queries"), strict=True
        )
    ]


def cpu_attention_cases() -> list[AttentionCase]:
    """What a CPU can time in a minute."""
    return [
        AttentionCase("forward", 8, 128, *_MINILM, torch.float32),
        AttentionCase("forward", 32, 128, *_MINILM, torch.float32, mix="queries"),
        AttentionCase("forward", 8, 384, *_MINILM, torch.float32, mix="squad"),
    ]
