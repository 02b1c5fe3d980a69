"""ModernBERT, and Ettin, which is one: pre-norm, one product for q, k and v, rotary positions with
frequencies of their own in layers that attend within a window, and a gated MLP. Its model calls the
layers itself."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ...nn.bert import gating_form, gelu_form
from ...nn.joined import JoinedWeights
from ...nn.modules import untouched
from ...nn.parts import Gated, Parts, Positions
from ...packing.batch import Batch
from .. import heads, looping, model, rotary
from ..family import Family

SLIDING = "sliding_attention"


class Layer(rotary.Layer):
    TAKES = (*rotary.Layer.TAKES, "position_embeddings")

    @classmethod
    def container_kinds(cls, original: type) -> tuple[type, ...]:
        family: Any = sys.modules[original.__module__]
        return family.ModernBertAttention, family.ModernBertMLP

    def parts(self) -> Parts:
        modules: dict[str, Any] = self._modules
        attention, mlp = modules["attn"], modules["mlp"]._modules
        inside, activation = attention._modules, mlp["act"]
        drop = inside["out_drop"]
        return Parts(
            *(None, None, None),
            attention.attention_dropout if attention.training else 0.0,
            inside["Wo"],
            None if untouched(drop, nn.Identity) else drop,
            modules["attn_norm"],
            mlp["Wi"],
            activation,
            gelu_form(activation),
            mlp["Wo"],
            None,
            modules["mlp_norm"],
            attention.config.num_attention_heads,
            attention.head_dim**-0.5,
            qkv=inside["Wqkv"],
            activation_dropout=mlp["drop"],
            norm_first=True,
            gated=Gated(None, gating_form(activation)),
        )

    def containers(self) -> tuple[nn.Module, ...]:
        return self.attn, self.mlp

    def self_attention(self) -> nn.Module:
        return self.attn

    def attributes(self) -> list[tuple[dict, str]]:
        return [(vars(self.attn), "is_causal")]

    def why_not(self) -> str | None:
        return "its attention is causal" if self.attn.is_causal else super().why_not()

    def prepare(self) -> None:
        self.__dict__["_bertfast_joined"] = JoinedWeights()  # nothing has to be

    def positions(self, batch: Batch, args: tuple, kwargs: dict) -> Positions:
        found = super().positions(batch, args, kwargs)
        if self.attention_type != SLIDING:
            return found
        side = self.attn.config.sliding_window
        return batch.once(found, lambda: found._replace(window=(side, side)), side)

    def original_mask(self, hidden_states: torch.Tensor, key_mask: torch.Tensor | None) -> Any:
        if self.attention_type != SLIDING:
            return super().original_mask(hidden_states, key_mask)
        from transformers.masking_utils import create_bidirectional_sliding_window_mask

        return create_bidirectional_sliding_window_mask(self.attn.config, hidden_states, key_mask)


class Model(rotary.Model, looping.Model):
    TOKENS = ("input_ids",)

    def rotary_module(self) -> Any:
        return self.rotary_emb

    def told(self, x: torch.Tensor, batch: Batch) -> Iterable[tuple[nn.Module, dict]]:
        layers = [(one, model.unwrapped(one).attention_type) for one in self.called()]
        kinds = {kind for _, kind in layers}
        made = {kind: rotary.tables(self.rotary_module(), batch, x, kind) for kind in kinds}
        return [(one, {"position_embeddings": made[kind]}) for one, kind in layers]

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        return self.final_norm(x)

    def finishers(self) -> list[nn.Module]:
        return [self.final_norm]


FAMILY = Family(
    "ModernBERT, Ettin",
    "ModernBert",
    "transformers.models.modernbert.modeling_modernbert",
    {"ModernBertEncoderLayer": Layer, "ModernBertModel": Model},
    {"ModernBertForMaskedLM": heads.ModernBert},
    layer="pre-norm, rotary, window, gated",
    original="transformers 5.0; " + rotary.ORIGINAL,
)
