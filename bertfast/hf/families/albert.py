"""ALBERT: few layers, called again and again, in groups; the embeddings have a width of their own.

A layer that comes again must drop other values: so each call of one draws a seed for itself.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...nn.bert import gelu_form
from ...nn.modules import has_own_forward
from ...nn.parts import Parts
from .. import bert, heads, layer, model
from ..family import Family


class Layer(layer.Layer):
    @classmethod
    def container_kinds(cls, original: type) -> tuple[type, ...]:
        family: Any = sys.modules[original.__module__]
        return (family.AlbertAttention,)

    def parts(self) -> Parts:
        modules: dict[str, Any] = self._modules
        attention = modules["attention"]
        inside, activation = attention._modules, self.activation
        return Parts(
            inside["query"],
            inside["key"],
            inside["value"],
            inside["attention_dropout"].p if attention.training else 0.0,
            inside["dense"],
            inside["output_dropout"],
            inside["LayerNorm"],
            modules["ffn"],
            activation,
            gelu_form(activation),
            modules["ffn_output"],
            None,  # the layer has a dropout, and never calls it
            modules["full_layer_layer_norm"],
            attention.num_attention_heads,
            attention.scaling,
        )

    def containers(self) -> tuple[nn.Module, ...]:
        return (self.attention,)

    def self_attention(self) -> nn.Module:
        return self.attention

    def attributes(self) -> list[tuple[dict, str]]:
        return [(vars(self), "chunk_size_feed_forward")]

    def why_not(self) -> str | None:
        if self.chunk_size_feed_forward:
            return "chunk_size_feed_forward is set"
        return super().why_not()


class Encoder(model.Encoder):
    def called(self) -> list[nn.Module]:
        groups = map(model.unwrapped, self.albert_layer_groups)
        return [layer for group in groups for layer in group.albert_layers]


class Model(bert.Model):
    def groups(self) -> list[Any]:
        """In the order in which they are called."""
        groups, count = self.encoder.albert_layer_groups, self.encoder.config.num_hidden_layers
        return [model.unwrapped(groups[int(i / (count / len(groups)))]) for i in range(count)]

    def encoder_layers(self) -> list[Any]:
        return [model.unwrapped(one) for group in self.groups() for one in group.albert_layers]

    def _attributes(self) -> list[tuple[dict, str]]:
        return [*super()._attributes(), (vars(self.encoder.config), "num_hidden_layers")]

    def why_untold(self) -> str | None:
        family: Any = sys.modules[self._original.__module__]
        kind = family.AlbertLayerGroup
        for group in self.groups():
            if not (type(group).forward is kind.forward and has_own_forward(kind)):
                return f"one of its groups is a {type(group).__name__} with a forward of its own"
        return super().why_untold()


class Head(heads.Head):
    _own = ()

    @classmethod
    def of_family(cls, family: Any, prefix: str) -> dict[str, Any]:
        return {"_containers": (("predictions", family.AlbertMLMHead),)}

    def transform(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
        head = self.predictions
        return head.dense, head.activation, head.LayerNorm

    def vocabulary(self) -> Any:
        return self.predictions.decoder


class PreTraining(heads.PreTraining, Head):
    _targets = "labels", "sentence_order_label"
    _scores = "sop_logits"

    def scores(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.sop_classifier(pooled)


FAMILY = Family(
    "ALBERT",
    "Albert",
    "transformers.models.albert.modeling_albert",
    {"AlbertLayer": Layer, "AlbertTransformer": Encoder, "AlbertModel": Model},
    {"AlbertForMaskedLM": Head, "AlbertForPreTraining": PreTraining},
    layer="post-norm, shared",
)
