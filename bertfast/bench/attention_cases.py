"""What is timed for attention: full batches of each length, and packed batches of real lengths."""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops, packing
from ..ops import dispatch
from ..testing import attention as testing
from . import length_mixes

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
Step = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class AttentionCase:
    """dropout(softmax(q k^T / sqrt(D))) v with q, k and v in one buffer.

    mix: None for sequences of `length` tokens each, or the name of a mix of lengths, packed."""

    pass_: str  # forward (inference), training (forward, saving for the backward), backward
    batch: int
    length: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    dropout: float = 0.0
    mix: str | None = None
    op: str = "attention_qkv"

    @property
    def shape(self) -> str:
        name = self.mix or str(self.length)
        return f"{self.batch}x{name}x{self.heads}x{self.head_dim}"

    def _lengths(self) -> list[int]:
        if self.mix is None:
            return [self.length] * self.batch
        return length_mixes.cu_seqlens(self.mix, self.batch).diff().tolist()

    @property
    def bytes(self) -> int:
        """The least that must move: q, k, v read and out written (and lse, float32, one value a
        row); in the backward q, k, v, out, dout and lse read and three gradients written."""
        values = {"forward": 4, "training": 4, "backward": 8}[self.pass_]
        statistics = 0 if self.pass_ == "forward" else 4
        rows = sum(self._lengths()) * self.heads
        return rows * (values * self.head_dim * self.dtype.itemsize + statistics)

    @property
    def flops(self) -> int:
        """Two products a score forward, five backward; only scores inside a sequence count."""
        products = 5 if self.pass_ == "backward" else 2
        scores = sum(length**2 for length in self._lengths()) * self.heads
        return products * 2 * scores * self.head_dim

    def inputs(self, device: str, seed: int) -> dict:
        generator = torch.Generator(device).manual_seed(seed)
        lead: tuple[int, ...] = (self.batch, self.length)
        layout = {}
        if self.mix is not None:
            cu = length_mixes.cu_seqlens(self.mix, self.batch).to(device)
            lead = (sum(self._lengths()),)
            longest = length_mixes.MIXES[self.mix].max_seqlen
            layout = {"cu_seqlens": cu, "max_seqlen": longest}
            layout["plan"] = packing.plan(cu, longest, lead[0])

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(self.dtype)

        return {
            "qkv": normal(*lead, 3, self.heads, self.head_dim),
            "dout": normal(*lead, self.heads, self.head_dim),
            "seed": torch.tensor([seed + 12345], device=device),
            "layout": layout,
        }

    def steps(self, function: Callable, inputs: dict) -> Step:
        """The pass as a function without arguments; `function` is one of `providers`."""
        seed, layout = inputs["seed"], inputs["layout"]
        if self.pass_ == "forward":

            def forward() -> tuple[torch.Tensor, ...]:
                with torch.no_grad():
                    return (function(inputs["qkv"], layout, seed, self.dropout),)

            return forward
        qkv = inputs["qkv"].detach().clone().requires_grad_()

        def training() -> tuple[torch.Tensor, ...]:
            return (function(qkv, layout, seed, self.dropout),)

        if self.pass_ == "training":
            return training
        (out,) = training()
        return lambda: torch.autograd.grad(out, [qkv], inputs["dout"], retain_graph=True)

    def providers(self, device: str, compile_backend: str = "inductor") -> dict[str, Callable]:
        """Ours where they run here, then each backend of torch's, and flash-attention."""
        found: dict[str, Callable] = {}
        for backend in ("triton", "cuda"):
            case = (device, self.dtype, self.head_dim)
            if dispatch.unsupported_reason(self.op, backend, *case) is None:
                found[f"bertfast {backend}"] = _ours(backend)
        if self.mix is None:
            names = SDPA if device == "cuda" else {"math": SDPA["math"]}
            found |= {f"torch sdpa {name}": _sdpa(kind) for name, kind in names.items()}
        if device == "cuda" and importlib.util.find_spec("flash_attn"):
            found["flash-attention"] = _flash_attention
        return found

    def reference(self, inputs: dict) -> dict[str, Callable]:
        """What is right, in float64 on the inputs' device."""
        wide = inputs | {name: inputs[name].double() for name in ("qkv", "dout")}
        right = self.steps(_ours("torch"), wide)
        return {"bertfast": right, "torch": right}

    def for_budget(self) -> testing.Case:
        """A short sequence of it, for the error budget."""
        return testing.Case((67,), heads=2, head_dim=self.head_dim, p=self.dropout)

    def without_dropout(self) -> "AttentionCase":
        """To check others, whose own random mask can't be known."""
        return replace(self, dropout=0.0)


def _ours(backend: str) -> Callable:
    def run(qkv, layout, seed, p):
        return ops.attention_qkv(qkv, **layout, dropout_p=p, seed=seed, backend=backend)

    return run


def _sdpa(kind: SDPBackend) -> Callable:
    def run(qkv, layout, seed, p):
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2)

    return run


def _flash_attention(qkv, layout, seed, p):
    import flash_attn

    if not layout:
        return flash_attn.flash_attn_qkvpacked_func(qkv, dropout_p=p)
    return flash_attn.flash_attn_varlen_qkvpacked_func(
        qkv, layout["cu_seqlens"], layout["max_seqlen"], dropout_p=p
    )


_PASSES = (("forward", 0.0), ("training", 0.1), ("backward", 0.1), ("backward", 0.0))


def attention_cases() -> list[AttentionCase]:
    """16384 tokens of BERT-base's heads in bf16 first, then mixes of lengths, then MiniLM's."""
    tokens, bf16 = 16384, torch.bfloat16
    cases = [
        AttentionCase(pass_, tokens // length, length, 12, 64, bf16, p)
        for length, (pass_, p) in itertools.product((128, 512, 384, 256), _PASSES)
    ]
    cases += [
        AttentionCase(pass_, 64, mix.max_seqlen, 12, 64, bf16, p, name)
        for (name, mix), (pass_, p) in itertools.product(length_mixes.MIXES.items(), _PASSES)
    ]
    cases += [
        AttentionCase(pass_, tokens // length, length, 12, 32, bf16, p)
        for length, (pass_, p) in itertools.product((128, 512, 384, 256), _PASSES)
    ]
    return cases


def dry_attention_cases() -> list[AttentionCase]:
    """One tiny case a pass: the interpreter is slow."""
    return [AttentionCase(pass_, 1, 20, 1, 32, torch.float16, p) for pass_, p in _PASSES[:3]]
