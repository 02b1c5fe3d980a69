"""What is timed for each op: shapes in order of importance, inputs, providers, bytes.

A new op adds one class like LayerNormCase and its list to `all_cases` and `dry_cases`.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ... import ops
from ...testing import bias_gelu as bias_gelu_testing
from ...testing import layer_norm as layer_norm_testing
from .attention_cases import (
    AttentionCase,
    attention_cases,
    cpu_attention_cases,
    dry_attention_cases,
)
from .stepping import Step, ours_and, step

EPS = 1e-12


def layer_norm_bytes(pass_: str, rows: int, width: int, itemsize: int, dropout: bool) -> int:
    """The least that layer_norm with x_bias and residual must move through memory.

    forward    values an element: x and residual read, y written                       3
    training   and z written; mean and rstd (float32) are one value a row              4
    backward   dy and z read, dz (both dx and dresidual) written                       3
               with dropout dx differs from dresidual: written too                     4
    Parameters and their gradients are one row each, counted; the partial sums, which are a choice
    of the implementation, are not. The dropout mask moves nothing: it is computed.
    """
    values = {"forward": 3, "training": 4, "backward": 4 if dropout else 3}[pass_]
    statistics = 0 if pass_ == "forward" else 2 * 4 * rows
    parameter_rows = {"forward": 3, "training": 3, "backward": 4}[pass_]
    return (values * rows + parameter_rows) * width * itemsize + statistics


@dataclass(frozen=True)
class LayerNormCase:
    """y = LayerNorm(dropout(x + x_bias) + residual) * weight + bias, as in an encoder layer."""

    pass_: str  # forward (inference), training (forward, saving for the backward), backward
    rows: int
    width: int
    dtype: torch.dtype
    dropout: float = 0.0
    op: str = "layer_norm"

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}"

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        return layer_norm_bytes(self.pass_, self.rows, self.width, size, self.dropout > 0)

    flops = 0  # bound by memory

    def inputs(self, device: str, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, device=device)
            return values.to(self.dtype)

        shape, width = (self.rows, self.width), self.width
        return {
            "x": normal(*shape),
            "weight": 1 + 0.1 * normal(width),
            "bias": normal(width),
            "residual": normal(*shape),
            "x_bias": normal(width),
            "dy": normal(*shape),
            "seed": torch.tensor([seed + 12345], device=device),
        }

    def steps(self, function: Callable, inputs: dict[str, torch.Tensor]) -> Step:
        """The pass as a function without arguments; `function` is one of `providers`."""
        leaves = {k: v for k, v in inputs.items() if k not in ("dy", "seed")}
        # Inference has no dropout.
        p = 0.0 if self.pass_ == "forward" else self.dropout
        call = functools.partial(function, seed=inputs["seed"], p=p)
        return step(self.pass_, call, leaves, inputs["dy"])

    def providers(self, device: str, compile_backend: str = "inductor") -> dict[str, Callable]:
        found = ours_and(self.op, _ours, device, _stock, compile_backend)
        liger = _liger(device)
        return found | ({"Liger": liger} if liger else {})

    def reference(self, inputs: dict[str, torch.Tensor], provider: str) -> Step:
        """What is right, in float64 on the inputs' device: with our mask, or without any."""
        wide = {k: v if k == "seed" else v.double() for k, v in inputs.items()}
        return self.steps(_ours("torch") if provider.startswith("bertfast") else _stock, wide)

    def without_dropout(self) -> "LayerNormCase":
        """To check stock torch, whose own random mask can't be known."""
        return LayerNormCase(self.pass_, self.rows, self.width, self.dtype)

    def for_budget(self) -> layer_norm_testing.Case:
        """A few rows of it, for the error budget."""
        return layer_norm_testing.Case((67, self.width), p=self.dropout)


def _ours(backend: str) -> Callable:
    def run(x, weight, bias, residual, x_bias, seed, p):
        return ops.layer_norm(
            x,
            weight,
            bias,
            eps=EPS,
            residual=residual,
            x_bias=x_bias,
            dropout_p=p,
            seed=seed,
            backend=backend,
        )

    return run


def _stock(x, weight, bias, residual, x_bias, seed, p):
    z = F.dropout(x + x_bias, p, training=p > 0) + residual
    return F.layer_norm(z, z.shape[-1:], weight, bias, EPS)


def _liger(device: str) -> Callable | None:
    """Liger's LayerNorm after torch's addition and dropout, if it is installed."""
    if device != "cuda":
        return None
    try:
        from liger_kernel.transformers.functional import liger_layer_norm
    except ImportError:
        return None

    def run(x, weight, bias, residual, x_bias, seed, p):
        z = F.dropout(x + x_bias, p, training=p > 0) + residual
        return liger_layer_norm(z, weight, bias, EPS)

    return run


_PASSES = (("forward", 0.0), ("training", 0.1), ("backward", 0.1), ("training", 0.0))
_PASSES += (("backward", 0.0),)


def layer_norm_cases() -> list[LayerNormCase]:
    """Most important first: BERT-base's width at a full batch in bf16, then outward."""
    cases = []
    order = itertools.chain(
        itertools.product((16384,), (768, 1024, 384), (torch.bfloat16, torch.float16)),
        itertools.product((128, 4096, 24576), (768, 1024, 384), (torch.bfloat16,)),
        itertools.product((16384,), (768, 1024, 384), (torch.float32,)),
        itertools.product((128, 4096, 24576), (768, 1024, 384), (torch.float16, torch.float32)),
    )
    for rows, width, dtype in order:
        cases += [LayerNormCase(pass_, rows, width, dtype, p) for pass_, p in _PASSES]
    return cases


def bias_gelu_bytes(pass_: str, rows: int, width: int, itemsize: int) -> int:
    """The least that bias_gelu must move through memory.

    forward    values an element: x read, y written; x is what the backward needs, too     2
    backward   dy and x read, dx written                                                   3
    The bias is one row, and so is its gradient; the partial sums are not counted.
    """
    values, parameter_rows = {"forward": (2, 1), "backward": (3, 2)}[pass_]
    return (values * rows + parameter_rows) * width * itemsize


@dataclass(frozen=True)
class BiasGeluCase:
    """y = gelu(x + bias), as between the two Linears of an encoder layer's feed-forward part."""

    pass_: str  # forward (in training too: nothing more is saved) or backward
    rows: int
    width: int
    dtype: torch.dtype
    op: str = "bias_gelu"

    dropout = 0.0
    flops = 0  # bound by memory

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}"

    @property
    def bytes(self) -> int:
        return bias_gelu_bytes(self.pass_, self.rows, self.width, self.dtype.itemsize)

    def inputs(self, device: str, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = {"x": (self.rows, self.width), "bias": (self.width,)}
        shapes["dy"] = shapes["x"]
        return {
            name: torch.randn(shape, generator=generator, device=device).to(self.dtype)
            for name, shape in shapes.items()
        }

    def steps(self, function: Callable, inputs: dict[str, torch.Tensor]) -> Step:
        """The pass as a function without arguments; `function` is one of `providers`."""
        leaves = {name: inputs[name] for name in ("x", "bias")}
        return step(self.pass_, function, leaves, inputs["dy"])

    def providers(self, device: str, compile_backend: str = "inductor") -> dict[str, Callable]:
        return ours_and(self.op, _our_gelu, device, _stock_gelu, compile_backend)

    def reference(self, inputs: dict[str, torch.Tensor], provider: str) -> Step:
        """What is right, in float64 on the inputs' device."""
        wide = {name: value.double() for name, value in inputs.items()}
        return self.steps(_stock_gelu, wide)

    def for_budget(self) -> bias_gelu_testing.Case:
        """A few rows of it, for the error budget."""
        return bias_gelu_testing.Case((67, self.width))


def _our_gelu(backend: str) -> Callable:
    return functools.partial(ops.bias_gelu, backend=backend)


def _stock_gelu(x, bias):
    return F.gelu(x + bias)


def bias_gelu_cases() -> list[BiasGeluCase]:
    """Most important first: BERT-base's inner width at a full batch in bf16, then outward."""
    order = itertools.chain(
        itertools.product((16384,), (3072, 4096, 1536), (torch.bfloat16, torch.float16)),
        itertools.product((128, 4096), (3072,), (torch.bfloat16,)),
        itertools.product((16384,), (3072,), (torch.float32,)),
    )
    return [
        BiasGeluCase(pass_, rows, width, dtype)
        for rows, width, dtype in order
        for pass_ in ("forward", "backward")
    ]


Case = LayerNormCase | BiasGeluCase | AttentionCase


def all_cases() -> list[Case]:
    """The ops take turns, so that a run that is cut short has the most important of each."""
    lists = (attention_cases(), layer_norm_cases(), bias_gelu_cases())
    turns = itertools.zip_longest(*lists)
    return [case for turn in turns for case in turn if case is not None]


def cpu_cases() -> list[Case]:
    """What a CPU can time in a minute, in float32: MiniLM's and BERT-base's sizes."""
    fp32 = torch.float32
    return [
        *cpu_attention_cases(),
        *(LayerNormCase("forward", 4096, width, fp32) for width in (384, 768)),
        LayerNormCase("backward", 4096, 768, fp32),
        *(BiasGeluCase("forward", 1024, width, fp32) for width in (1536, 3072)),
        BiasGeluCase("backward", 1024, 3072, fp32),
    ]


def dry_cases() -> list[Case]:
    """One tiny case a pass, with every dtype among them: the interpreter is slow."""
    dtypes = itertools.cycle((torch.float32, torch.float16, torch.bfloat16))
    layer_norm = [
        LayerNormCase(pass_, 6, 64, dtype, p)
        for (pass_, p), dtype in zip(_PASSES, dtypes, strict=False)
    ]
    return [
        *layer_norm,
        BiasGeluCase("forward", 6, 64, torch.bfloat16),
        BiasGeluCase("backward", 6, 64, torch.float16),
        *dry_attention_cases(),
    ]
