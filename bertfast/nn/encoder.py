"""Encoder and EncoderLayer: modules of our own, with the state_dict keys of Hugging Face's
BertEncoder."""

from typing import Any

import torch
from torch import nn

from .. import checks
from ..ops import dispatch
from ..ops.bias_gelu import APPROXIMATE
from ..packing.batch import Batch, full, layout
from ..settings import GRAPHS
from .bert import bert_parts
from .eligibility import Facts, facts_of, layer_facts
from .joined import JoinedWeights
from .layer import Call, for_layers, run_layer
from .parts import Parts


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.num_attention_heads = heads
        self.scaling = (width // heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)


class _Output(nn.Module):
    def __init__(self, inner: int, width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)


class EncoderLayer(nn.Module):
    """A post-norm encoder layer with the state_dict keys of Hugging Face's BertLayer."""

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        *,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        eps: float = 1e-12,
        approximate: str = "none",
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        """recompute: as in `bertfast.optimize`."""
        super().__init__()
        for name, size in (("width", width), ("heads", heads), ("inner", inner)):
            checks.check_int(name, size, 1)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads ({heads}), got {width}")
        checks.check_number("dropout", dropout, 0, 1)
        checks.check_number("attention_dropout", attention_dropout, 0, 1)
        checks.check_number("eps", eps, least=0)
        checks.check_choice("approximate", approximate, APPROXIMATE)
        checks.check_choice("backend", backend, dispatch.CHOICES)
        checks.check_bool("recompute", recompute)
        self.width = width
        self.attention = nn.Module()
        self.attention.self = _SelfAttention(width, heads, attention_dropout)
        self.attention.output = _Output(width, width, eps, dropout)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, inner)
        self.intermediate.intermediate_act_fn = nn.GELU(approximate)
        self.output = _Output(inner, width, eps, dropout)
        self.backend = backend
        self.recompute = recompute
        attention = self.attention.self
        self._joined = JoinedWeights((attention.query, attention.key, attention.value))

    def forward(self, x: torch.Tensor, batch: Batch | None = None) -> torch.Tensor:
        _check_tokens(x, self.width)
        if batch is not None and not isinstance(batch, Batch):
            raise TypeError(
                f"batch must be a bertfast.packing.batch.Batch, got {checks.kind(batch)}"
            )
        batch = batch or Batch()
        call = Call(batch, self._joined, self.training, self.backend, self.recompute, id(self))
        return run_layer(self.parts(), x, call)

    def parts(self) -> Parts:
        return bert_parts(self)


class Encoder(nn.Module):
    """Layers after one another, with the state_dict keys of Hugging Face's BertEncoder.

    forward(x, mask): x (rows, length, width); mask, bool (rows, length), says which tokens are
    attended. With `packed`, padding is taken out before the first layer and comes back after the
    last, where it repeats its row's first token.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        inner: int,
        *,
        packed: bool = True,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        checks.check_int("layers", layers, 1)
        checks.check_bool("packed", packed)
        self.layer = nn.ModuleList(
            EncoderLayer(width, heads, inner, backend=backend, **options) for _ in range(layers)
        )
        self.width = width
        self.packed = packed
        self.backend = backend

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        _check_tokens(x, self.width)
        if mask is not None:
            checks.check_mask("mask", mask, x.shape[:2], None)
            if mask.device.type != "cpu":  # one on a CPU saves the wait for what it holds
                checks.check_place("mask", mask, x.device, "x")
        graphs = self.graphs_of_layers()
        buckets = None if graphs is None or self.training else graphs.offered(x)
        if mask is None:
            batch = full(x.shape[:2], x.device, buckets)
        else:
            sort = not self.training
            batch = layout(mask, self.packed, x.device, self.backend, sort, buckets=buckets)
        facts = facts_of(self, self._find, list)
        batch = for_layers(batch, facts, x.device)
        leave = batch.unpack if batch.packed else None
        if leave is not None:
            x = batch.pack(x)
        if graphs is not None and batch.bucket is not None:
            y = graphs.serve(x, batch, self._run, leave or torch.clone)
            if y is not None:
                return y
        x = self._run(x, batch)
        return x if leave is None else leave(x)

    def _run(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        for layer in self.layer:
            x = layer(x, batch)
        return x

    def graphs_of_layers(self) -> Any:
        """Its CUDA graphs, where `bertfast.optimize(model, graphs=True)` asked for them."""
        return self.__dict__.get(GRAPHS)

    def call_with(self, rows: int, length: int) -> None:
        """The call of a batch of so many tokens without padding."""
        first: Any = self.layer[0]
        self(first.output.LayerNorm.weight.new_zeros(rows, length, self.width))

    def _find(self) -> Facts:
        return Facts(untold=None, **layer_facts(self.layer))


def _check_tokens(x: torch.Tensor, width: int) -> None:
    checks.check_float("x", x)
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"x must have shape [rows, length, {width}], got {checks.shape(x)}")
