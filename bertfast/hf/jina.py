"""Jina-v3's layer and model, which GTE and NomicBERT have under their own names: post-norm, with
rotary positions, and an MLP that is gated in those two."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..nn.bert import gating_form, gelu_form
from ..nn.parts import Gated, Parts
from ..packing.batch import Batch
from . import looping, rotary


class Layer(rotary.Layer):
    TAKES = (*rotary.Layer.TAKES, "position_embeddings")

    @classmethod
    def container_kinds(cls, original: type) -> tuple[type, ...]:
        family: Any = sys.modules[original.__module__]
        prefix = original.__name__.removesuffix("Layer")
        return getattr(family, prefix + "Attention"), getattr(family, prefix + "MLP")

    def parts(self) -> Parts:
        modules: dict[str, Any] = self._modules
        attention, mlp = modules["self_attn"], modules["mlp"]._modules
        inside = attention._modules
        if gate := mlp.get("gate_proj"):
            up, down, activation = mlp["up_proj"], mlp["down_proj"], mlp["act_fn"]
            gated = Gated(gate, gating_form(activation))
        else:
            up, down, activation = mlp["fc1"], mlp["fc2"], mlp["activation_fn"]
            gated = None
        return Parts(
            inside["q_proj"],
            inside["k_proj"],
            inside["v_proj"],
            attention.attention_dropout if attention.training else 0.0,
            inside["o_proj"],
            modules["post_attention_dropout"],
            modules["post_attention_layernorm"],
            up,
            activation,
            gelu_form(activation),
            down,
            modules["post_mlp_dropout"],
            modules["post_mlp_layernorm"],
            attention.config.num_attention_heads,
            attention.scaling,
            activation_dropout=mlp.get("dropout"),
            gated=gated,
        )

    def containers(self) -> tuple[nn.Module, ...]:
        return self.self_attn, self.mlp

    def self_attention(self) -> nn.Module:
        return self.self_attn

    def attributes(self) -> list[tuple[dict, str]]:
        return [(vars(self.self_attn), "is_causal")]

    def why_not(self) -> str | None:
        return "its attention is causal" if self.self_attn.is_causal else super().why_not()


class Model(rotary.Model, looping.Model):
    TOKENS = ("input_ids", "token_type_ids")

    def rotary_module(self) -> Any:
        return self.rotary_emb

    def called(self) -> list[nn.Module]:
        return super().called()[: self.config.num_hidden_layers]

    def told(self, x: torch.Tensor, batch: Batch) -> Iterable[tuple[nn.Module, dict]]:
        tables = rotary.tables(self.rotary_module(), batch, x)
        return [(one, {"position_embeddings": tables}) for one in self.called()]

    def _attributes(self) -> list[tuple[dict, str]]:
        return [*super()._attributes(), (vars(self.config), "num_hidden_layers")]


def classes(prefix: str) -> dict[str, Any]:
    """Of a family whose classes are named as Jina-v3's."""
    return {prefix + "Layer": Layer, prefix + "Model": Model}
