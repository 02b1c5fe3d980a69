"""MegatronBERT: pre-norm, and its model and encoder hand nothing down that they don't know. So the
model is written out here, and the batch goes to the layers in place of their mask."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from ...nn.modules import has_own_forward
from .. import bert, heads, model
from ..family import Family
from ..layer import ARGUMENT


class Layer(bert.PreNormLayer):
    PASSES_ON = False
    RETURNS_TUPLE = True

    def norms(self) -> tuple[nn.Module, nn.Module]:
        return self.attention.ln, self.ln

    def original_mask(self, hidden_states: torch.Tensor, key_mask: torch.Tensor) -> Any:
        least = torch.finfo(hidden_states.dtype).min
        return hidden_states.new_zeros(key_mask.shape).masked_fill(~key_mask, least)[:, None, None]


class Encoder(model.Encoder):
    PASSES_ON = False

    def call(self, x: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        batch = kwargs.pop(ARGUMENT, None)
        if batch is not None:
            kwargs["attention_mask"] = batch
        return super().call(x, args, kwargs)


class Model(bert.Model):
    PASSES_ON = False

    def _why_original(self, arguments: dict, facts: Any) -> str | None:
        if not has_own_forward(self._original):
            return f"the forward of {self._original.__name__} was replaced"
        if arguments.get("input_ids") is not None and arguments.get("inputs_embeds") is not None:
            return ""  # the original has an error for it
        return super()._why_original(arguments, facts)

    def call(self, arguments: dict) -> Any:
        batch = arguments.pop(ARGUMENT, None)
        if batch is None:
            return super().call(arguments)
        names = (*self.TOKENS, "inputs_embeds")
        encoded = self.encoder(
            self.embeddings(**{name: arguments.get(name) for name in names}),
            output_hidden_states=self.asked(arguments, "output_hidden_states"),
            **{ARGUMENT: batch},
        )
        hidden = encoded.last_hidden_state
        pooled = None if self.pooler is None else self.pooler(hidden)
        if not self.asked(arguments, "return_dict"):
            return (hidden, pooled, *encoded[1:])
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden, pooler_output=pooled, hidden_states=encoded.hidden_states
        )


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
