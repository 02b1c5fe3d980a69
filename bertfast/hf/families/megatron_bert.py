"""MegatronBERT: pre-norm, and its model and encoder hand nothing down that they don't know. So the
model is written out here, and the batch goes to the layers in place of their mask."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from .. import bert, heads, model
from ..family import Family
from ..layer import ARGUMENT


class Layer(bert.PreNormLayer):
    PASSES_ON = False
    RETURNS_TUPLE = True

    def norms(self) -> tuple[nn.Module, nn.Module]:
        return self.attention.ln, self.ln

    def original_mask(self, hidden_states: torch.Tensor, key_mask: torch.Tensor | None) -> Any:
        return bert.added_mask(hidden_states, key_mask)


class Encoder(model.Encoder):
    PASSES_ON = False

    def call(self, x: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        batch = kwargs.pop(ARGUMENT, None)
        if batch is not None:
            kwargs["attention_mask"] = batch
        return super().call(x, args, kwargs)


class Model(bert.WrittenOut):
    OUTPUTS = BaseModelOutputWithPoolingAndCrossAttentions


FAMILY = Family(
    "MegatronBERT",
    "MegatronBert",
    "transformers.models.megatron_bert.modeling_megatron_bert",
    bert.classes("MegatronBert", Layer, Encoder, Model),
    {
        "MegatronBertForMaskedLM": heads.Bert,
        "MegatronBertForPreTraining": heads.BertPreTraining,
    },
    layer="pre-norm",
)
