"""Layers and whole models as cases: held to float64 in hidden states and gradients, then timed."""

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...testing import UNIT_ROUNDOFF
from . import floor, predicted
from .case import Step, held, normal, relative
from .models import Model, Tokens
from .providers import Provider, Runner, of_kind
from .timing import captured, waited_for

PASSES = ("forward", "forward+backward", "latency")
REFERENCE_TOKENS = 4096  # float64 runs this many at a time

Named = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    stock: Any  # a module in eval, with SDPA; it stays as it is
    tensors: Named  # a model's arguments, or a layer's "x"
    dy: torch.Tensor | None  # in the case's dtype, zero at padding
    hidden: torch.Tensor  # float64
    gradients: Named  # float64
    mask: torch.Tensor


@dataclass(frozen=True)
class EncoderCase:
    model: Model
    tokens: Tokens
    pass_: str  # one of PASSES; latency: one call, and waiting for it
    dtype: torch.dtype
    layer: bool = False  # one layer alone, on hidden states

    clock: ClassVar[str] = "call"

    @property
    def kind(self) -> str:
        return "layer" if self.layer else "model"

    @property
    def training(self) -> bool:
        return self.pass_ == "forward+backward"

    @property
    def dropout(self) -> float:
        return 0.1 if self.training else 0.0

    @property
    def op(self) -> str:
        return self.model.name + (" layer" if self.layer else "")

    @property
    def shape(self) -> str:
        return self.tokens.name

    def work(self) -> list[floor.Work]:
        count = floor.layer if self.layer else floor.model
        return count(self.model, self.tokens.lengths, self.dtype.itemsize, self.training)

    def counts(self, provider: Provider) -> predicted.Counts | None:
        return predicted.encoder(
            *(self.model, self.tokens, self.dtype, self.training, self.layer), provider.name
        )

    def providers(self) -> Sequence[Provider]:
        return of_kind(self.kind)

    def rates(self, seconds: float) -> dict[str, float]:
        real, padded = self.tokens.real / seconds, self.tokens.padded / seconds
        return {"tokens_per_s": real, "padded_tokens_per_s": padded}

    def limit(self, gradients: bool) -> float:
        layers = 1 if self.layer else self.model.layers
        return limit(self.dtype, layers, self.model.inner, gradients)

    def call(self, module: nn.Module, tensors: Named) -> torch.Tensor:
        """Hidden states."""
        y = module(tensors["x"]) if self.layer else module(**tensors)[0]
        return y[0] if isinstance(y, tuple) else y

    def with_attention(self, module: Any, implementation: str) -> Any:
        """A copy whose attention is "eager", "sdpa", ...; the original's config stays as it is."""
        module = copy.deepcopy(module)
        if self.layer:
            module.attention.self.config._attn_implementation = implementation
        else:
            module.set_attn_implementation(implementation)
        return module

    def inputs(self, device: str, seed: int) -> Inputs:
        """With the reference: plain attention in float64, a few rows at a time, whose gradients add
        up."""
        stock = _stock(self.model, device, self.dtype, self.layer)
        mask = self.tokens.mask(device)
        shape = (*mask.shape, self.model.width)
        if self.layer:
            tensors = {"x": normal(device, seed + 1, self.dtype)(*shape)}
        else:
            tensors = self.tokens.inputs(device, stock.config.vocab_size)
        dy = None
        if self.training:
            dy = normal(device, seed + 2, self.dtype)(*shape) * mask[..., None]
        wide = self.with_attention(stock, "eager").double()
        hidden = []
        step = max(1, REFERENCE_TOKENS // self.tokens.longest)
        for first in range(0, len(mask), step):
            part = slice(first, first + step)
            given = {name: tensor[part] for name, tensor in tensors.items()}
            if self.layer:
                given["x"] = given["x"].double()
            with torch.set_grad_enabled(self.training):
                y = self.call(wide, given)
            if dy is not None:
                y.backward(dy[part].double())
            hidden.append(y.detach())
        return Inputs(stock, tensors, dy, torch.cat(hidden), _gradients(wide), mask)

    def check(self, provider: Provider, runner: Runner, inputs: Inputs) -> float:
        """Without dropout."""
        with torch.set_grad_enabled(self.training):
            y = runner.forward()
        error = held(hidden_error(y.detach(), inputs), self.limit(gradients=False))
        if self.training:
            y.backward(inputs.dy)
            worst = gradient_error(runner.to_ours(_gradients(runner.module)), inputs.gradients)
            error = max(error, held(worst, self.limit(gradients=True), "gradients: "))
            runner.module.zero_grad(set_to_none=True)
        return error

    def step(self, runner: Runner, inputs: Inputs) -> Step:
        """With dropout, where it is training. What a graph replays is checked once more."""
        if self.training:
            runner.module.train()

            def train() -> None:
                runner.forward().backward(inputs.dy)
                runner.module.zero_grad(set_to_none=True)

            return train

        def infer() -> torch.Tensor:
            with torch.inference_mode():
                return runner.forward()

        step: Step = infer
        if runner.capture:
            graph, (y,) = captured([infer])
            graph.replay()
            held(hidden_error(y, inputs), self.limit(gradients=False), "in a graph: ")
            step = graph.replay
        return waited_for(step, inputs.mask.device.type) if self.pass_ == "latency" else step


@functools.lru_cache(maxsize=1)  # cases of one model follow one another
def _stock(model: Model, device: str, dtype: torch.dtype, layer: bool) -> Any:
    module: Any = model.build(device, dtype, layers=1 if layer else None)
    return module.encoder.layer[0] if layer else module


def limit(dtype: torch.dtype, layers: int, inner: int, gradients: bool) -> float:
    """||difference|| / ||reference|| that an honest implementation stays under.

    A layer rounds what it passes on about ten times, each time by at most u, and in float32 the
    partial sums of its longest product round as well: inner / 16 times, as they are taken in
    blocks. Errors of that many roundings add up as their root. Twice that is allowed, as
    everywhere, and twice again since a product passes on the errors of both its operands. The
    backward rounds as often again, on top of the forward's error in all that it reads: twice more.
    """
    roundings = 10 + (inner / 16 if dtype == torch.float32 else 0)
    return (8 if gradients else 4) * math.sqrt(roundings * layers) * UNIT_ROUNDOFF[dtype]


def hidden_error(y: torch.Tensor, inputs: Inputs) -> float:
    """Relative error on real tokens."""
    if y.shape != inputs.hidden.shape:
        return math.inf
    return relative(y[inputs.mask], inputs.hidden[inputs.mask])


def gradient_error(gradients: Named, right: Named) -> float:
    """The worst parameter's relative error. One whose gradient is nothing but rounding, as the key
    bias's, is measured by the largest gradient's size instead."""
    if not right.keys() <= gradients.keys():
        return math.inf
    least = 0.01 * max(gradient.norm().item() for gradient in right.values())
    return max(relative(gradients[name], gradient, least) for name, gradient in right.items())


def _gradients(module: nn.Module) -> Named:
    return {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def cases(
    models: Sequence[Model],
    batches: Sequence[Tokens],
    passes: Sequence[str],
    dtypes: Sequence[torch.dtype],
    layer: bool = False,
    several: bool = False,
) -> Iterator[EncoderCase]:
    """Every combination. Latency is measured where there is one sequence, or with `several` too."""
    for dtype in dtypes:
        for model in models:
            for tokens in batches:
                for pass_ in passes:
                    if pass_ != "latency" or several or len(tokens.lengths) == 1:
                        yield EncoderCase(model, tokens, pass_, dtype, layer)
