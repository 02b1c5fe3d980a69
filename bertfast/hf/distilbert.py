"""DistilBERT: the same layer with other names, and no dropout after the attention."""

import sys
from typing import Any

import torch
from torch import nn

from ..nn.bert import gelu_form
from ..nn.parts import Parts
from . import layer, model


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
    def encoder_module(self) -> nn.Module:
        return self.transformer

    def position_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embeddings.position_ids[:, : input_ids.shape[1]]
