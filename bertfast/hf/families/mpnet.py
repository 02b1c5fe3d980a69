"""MPNet: post-norm, with a bias by distance, which all layers share. Its model and encoder hand on
no argument that they don't know, so both are written out; layers are given each distance's bias."""

import sys
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from ...nn.bert import gelu_form
from ...nn.hooks import sees_layout
from ...nn.modules import plain, untouched
from ...nn.parts import NO_POSITIONS, Parts, Positions
from ...ops import bucket_bias
from ...ops.attention.scores import Block, bias_matrix
from ...packing.batch import Batch
from .. import bert, heads, layer, model
from ..family import Family
from ..layer import ARGUMENT

REACH, BUCKETS = 128, 32  # from that distance on the bucket is the same


class Layer(layer.Layer):
    TAKES = (*layer.Layer.TAKES, "position_bias")
    PASSES_ON = False
    RETURNS_TUPLE = True

    @classmethod
    def container_kinds(cls, original: type) -> tuple[type, ...]:
        family: Any = sys.modules[original.__module__]
        names = ("Attention", "SelfAttention", "Intermediate", "Output")
        return tuple(getattr(family, "MPNet" + name) for name in names)

    def parts(self) -> Parts:
        modules: dict[str, Any] = self._modules
        attention, output = modules["attention"]._modules, modules["output"]._modules
        attend, intermediate = attention["attn"], modules["intermediate"]
        inside, activation = attend._modules, intermediate.intermediate_act_fn
        return Parts(
            *(inside["q"], inside["k"], inside["v"]),
            inside["dropout"].p if attend.training else 0.0,
            *(inside["o"], attention["dropout"], attention["LayerNorm"]),
            intermediate._modules["dense"],
            activation,
            gelu_form(activation),
            *(output["dense"], output["dropout"], output["LayerNorm"]),
            attend.num_attention_heads,
            attend.attention_head_size**-0.5,
        )

    def containers(self) -> tuple[nn.Module, ...]:
        return self.attention, self.attention.attn, self.intermediate, self.output

    def self_attention(self) -> nn.Module:
        return self.attention.attn

    def positions(self, batch: Batch, args: tuple, kwargs: dict) -> Positions:
        return Positions(distance_bias=args[0]) if args else NO_POSITIONS

    def original_arguments(self, hidden_states: torch.Tensor, args: tuple) -> tuple:
        length = hidden_states.shape[1]
        return bias_matrix(args[0], Block(0, length, 0, length))[None], *args[1:]

    def original_mask(self, hidden_states: torch.Tensor, key_mask: torch.Tensor | None) -> Any:
        return bert.added_mask(hidden_states, key_mask)


class Encoder(model.Encoder):
    PASSES_ON = False

    def buckets(self, device: torch.device) -> torch.Tensor:
        distances = torch.arange(-REACH, REACH + 1, device=device)
        return self.relative_position_bucket(distances, num_buckets=BUCKETS)

    def distance_bias(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """A graph has this in it, but for the buckets, which stay the same."""
        buckets = batch.once(self, lambda: self.buckets(device))
        table = self.relative_attention_bias
        read = untouched(table, nn.Embedding) and plain(table.weight)
        return bucket_bias(table.weight, buckets) if read else table(buckets).t()

    def call(self, x: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        batch = kwargs.pop(ARGUMENT, None)
        if batch is None:
            return super().call(x, args, kwargs)
        bias = self.distance_bias(batch, x.device)
        shown: Any = (x,) if kwargs.get("output_hidden_states") else None
        for one in self.layer:
            x = one(x, batch, bias)[0]
            shown = shown and (*shown, x)
        return BaseModelOutput(last_hidden_state=x, hidden_states=shown)


class Model(bert.WrittenOut):
    TOKENS = ("input_ids", "position_ids")
    OUTPUTS = BaseModelOutputWithPooling

    def position_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        family: Any = sys.modules[self._original.__module__]
        return family.create_position_ids_from_input_ids(input_ids, self.embeddings.padding_idx)

    def knows_distances(self) -> bool:
        return True

    def why_untold(self) -> str | None:
        seen = sees_layout(self.encoder.relative_attention_bias)
        told = "a hook on its relative_attention_bias sees pairs of tokens" if seen else None
        return super().why_untold() or told


FAMILY = Family(
    "MPNet",
    "MPNet",
    "transformers.models.mpnet.modeling_mpnet",
    {"MPNetLayer": Layer, "MPNetEncoder": Encoder, "MPNetModel": Model},
    {"MPNetForMaskedLM": heads.Roberta},
    layer="post-norm, bias by distance",
)
