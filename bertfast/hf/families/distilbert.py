"""DistilBERT: the same layer with other names, and no dropout after the attention."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...nn.bert import gelu_form
from ...nn.modules import is_hooked
from ...nn.parts import Parts
from .. import heads, layer, model
from ..family import Family


class Layer(layer.Layer):
    @classmethod
    def container_kinds(cls, original: type) -> tuple[type, ...]:
        family: Any = sys.modules[original.__module__]
        return family.DistilBertSelfAttention, family.FFN

    def parts(self) -> Parts:
        modules: dict[str, Any] = self._modules
        attention, mlp = modules["attention"], modules["ffn"]
        inside, ffn = attention._modules, mlp._modules
        activation = ffn.get("activation")
        if activation is None:  # a plain function
            activation = mlp.activation
        return Parts(
            inside["q_lin"],
            inside["k_lin"],
            inside["v_lin"],
            inside["dropout"].p if attention.training else 0.0,
            inside["out_lin"],
            None,
            modules["sa_layer_norm"],
            ffn["lin1"],
            activation,
            gelu_form(activation),
            ffn["lin2"],
            ffn["dropout"],
            modules["output_layer_norm"],
            attention.n_heads,
            attention.scaling,
        )

    def containers(self) -> tuple[nn.Module, ...]:
        return self.attention, self.ffn

    def self_attention(self) -> nn.Module:
        return self.attention

    def attributes(self) -> list[tuple[dict, str]]:
        return [(self.ffn.__dict__, "chunk_size_feed_forward")]

    def why_not(self) -> str | None:
        if self.ffn.chunk_size_feed_forward:
            return "chunk_size_feed_forward is set"
        return super().why_not()


class Model(model.Model):
    @classmethod
    def own_kinds(cls, original: type) -> tuple[type, ...]:
        family: Any = sys.modules[original.__module__]
        return (family.Embeddings,)

    def encoder_module(self) -> nn.Module:
        return self.transformer

    def position_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embeddings.position_ids[:, : input_ids.shape[1]]


class Head(heads.Head):
    _containers = ()
    _own = ()
    _cuts_by_config = False
    _losses = frozenset(("mlm_loss_fct",))

    @classmethod
    def of_family(cls, family: Any, prefix: str) -> dict[str, Any]:
        return {}

    def encode(self, input_ids: Any, arguments: dict) -> Any:
        return self.distilbert(input_ids=input_ids, **arguments)

    def transform(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
        return self.vocab_transform, self.activation, self.vocab_layer_norm

    def vocabulary(self) -> Any:
        return self.vocab_projector

    def why_original(self) -> str | None:
        loss = self.mlm_loss_fct
        form = (type(loss), loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing)
        if form != (nn.CrossEntropyLoss, None, heads.IGNORED, "mean", 0.0) or is_hooked(loss):
            return "its mlm_loss_fct isn't CrossEntropyLoss as it was"
        return super().why_original()


FAMILY = Family(
    "DistilBERT",
    "DistilBert",
    "transformers.models.distilbert.modeling_distilbert",
    {"TransformerBlock": Layer, "Transformer": model.Encoder, "DistilBertModel": Model},
    {"DistilBertForMaskedLM": Head},
)
