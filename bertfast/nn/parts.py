"""The modules of a layer, whatever their names; and a call of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.attention.scores import narrows
from ..ops.dropout import NO_DROPOUT, Dropout, draw_seed, dropout_of
from ..ops.layer_norm.run import Norm
from ..packing.batch import Batch
from .joined import JoinedWeights
from .modules import Weights, read_dropout, read_linear, read_norm

PLACES = ATTENTION, AFTER_ATTENTION, AFTER_MLP = range(3)  # of a layer's dropouts


class Gated(NamedTuple):
    """An MLP of activation(gate(x)) * up(x)."""

    gate: nn.Module | None  # None: `up` makes both halves, the activated one first
    activation: str | None  # by its name in ops.gated; None: another function


class Parts(NamedTuple):
    """The modules of a layer, whatever their names."""

    query: nn.Module | None
    key: nn.Module | None
    value: nn.Module | None
    attention_dropout: float  # as it applies now: 0 in eval
    attention_output: nn.Module | Weights
    attention_output_dropout: nn.Module | None
    attention_norm: nn.Module
    up: nn.Module
    activation: Callable
    approximate: str | None  # of the GELU that the activation is; None: another function
    down: nn.Module
    down_dropout: nn.Module | None
    down_norm: nn.Module
    heads: int
    scale: float
    qkv: nn.Module | Weights | None = None  # one product, where there are no three Linears
    activation_dropout: nn.Module | None = None
    norm_first: bool = False
    gated: Gated | None = None


class Read(NamedTuple):
    """The parts as they are now: read where that is allowed, else modules to be called."""

    qkv: tuple[Weights | nn.Module, ...]  # one product, or q, k and v
    attention_output: Weights | nn.Module
    attention_output_dropout: float | nn.Module
    attention_norm: Norm | nn.Module
    up: tuple[Weights | nn.Module, ...]  # one product, or gate and up
    activation_dropout: float | nn.Module
    down: Weights | nn.Module
    down_dropout: float | nn.Module
    down_norm: Norm | nn.Module


def read(parts: Parts, clean: bool) -> Read:
    """Decides, once a call, which modules are read and which are called. clean: they are known to
    have no hooks, so that their classes alone decide."""
    if parts.qkv is None:
        linears: Any = (parts.query, parts.key, parts.value)
        qkv = tuple(read_linear(linear, clean) for linear in linears)
    else:
        qkv = (read_linear(parts.qkv, clean),)
    up: tuple[Weights | nn.Module, ...] = (read_linear(parts.up, clean),)
    if parts.gated is not None and parts.gated.gate is not None:
        up = (read_linear(parts.gated.gate, clean), *up)
    return Read(
        qkv,
        read_linear(parts.attention_output, clean),
        read_dropout(parts.attention_output_dropout, clean),
        read_norm(parts.attention_norm, clean),
        up,
        read_dropout(parts.activation_dropout, clean),
        read_linear(parts.down, clean),
        read_dropout(parts.down_dropout, clean),
        read_norm(parts.down_norm, clean),
    )


class Positions(NamedTuple):
    """All that tells a layer's scores where their queries and keys stand, as in ops.attention. Made
    once a forward, for all layers of a kind."""

    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    window: tuple[int, int] | None = None
    distance_bias: torch.Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if value is not None}

    def features(self, longest: int) -> tuple[str, ...]:
        """Those that change the scores of sequences of up to so many tokens."""
        given = self.arguments()
        if self.window is not None and not narrows(self.window, longest):
            del given["window"]
        return tuple(given)


NO_POSITIONS = Positions()


class Call(NamedTuple):
    """One call of a layer."""

    batch: Batch
    joined: JoinedWeights
    training: bool  # the layer's own flag
    backend: str = "auto"
    recompute: bool = False  # less is saved, and made again in the backward
    layer: int | None = None  # its id, by which the batch knows its number
    joined_up: JoinedWeights | None = None  # of a gated MLP with two products
    positions: Positions = NO_POSITIONS


class Dropouts:
    """The dropouts of one call of a layer, all by one seed: the batch's, which serves all layers,
    or one that is drawn for this call."""

    def __init__(self, call: Call) -> None:
        numbers, layer = call.batch.numbers, call.layer
        number = None if numbers is None or layer is None else numbers.get(layer)
        self._seed = None if number is None else call.batch.seed
        self._first = 0 if number is None else len(PLACES) * number

    def of(
        self, x: torch.Tensor, p: float, place: int, rows: torch.Tensor | None = None
    ) -> Dropout:
        """Of values that lie where x does."""
        if not p:
            return NO_DROPOUT
        if self._seed is None:
            self._seed = draw_seed(x.device)
        return dropout_of(p, self._seed, self._first + place, x.device, rows)
