"""ESM-2: pre-norm, with rotary positions or absolute ones. Its embeddings know how much of a row is
masked: so they always see the padded batch, and the encoder packs what they give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from ...nn.modules import Weights, has_own_forward, read_linear
from ...nn.parts import Parts
from .. import bert, heads, model, rotary
from ..family import Family
from ..layer import ARGUMENT


class Layer(rotary.Layer, bert.Layer):
    TAKES = (*bert.Layer.TAKES, "position_embeddings")

    def parts(self) -> Parts:
        modules: dict[str, Any] = self._modules
        attention, output = modules["attention"]._modules, modules["output"]._modules
        attend, attended = attention["self"], attention["output"]._modules
        inside = attend._modules
        return Parts(
            inside["query"],
            inside["key"],
            inside["value"],
            attend.dropout if attend.training else 0.0,
            attended["dense"],
            attended["dropout"],
            attention["LayerNorm"],
            modules["intermediate"]._modules["dense"],
            nn.functional.gelu,  # its own is the same, in torch's words
            "none",
            output["dense"],
            output["dropout"],
            modules["LayerNorm"],
            attend.num_attention_heads,
            attend.attention_head_size**-0.5 * attend.scaling,
            norm_first=True,
        )


class Encoder(model.Encoder):
    TAKES = (*model.Encoder.TAKES, "position_embeddings")

    def call(self, x: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        batch = kwargs.get(ARGUMENT)
        if batch is not None and batch.facts is not None:
            for module in batch.facts.tables:
                if kwargs.get("position_embeddings") is None:
                    kwargs = {**kwargs, "position_embeddings": rotary.tables(module, batch, x)}
        return super().call(x, args, kwargs)


class Model(rotary.Model, bert.Model):
    def rotary_module(self) -> Any:
        return self.rotary_embeddings

    def before_packing(self, arguments: dict) -> None:
        if arguments.get("inputs_embeds") is None:
            names = ("input_ids", "attention_mask", "position_ids")
            given = {name: arguments.pop(name, None) for name in names}
            arguments["inputs_embeds"] = self.embeddings(**given)
        super().before_packing(arguments)

    def call(self, arguments: dict) -> Any:
        """Written out where a graph may serve the encoder: the original forward makes tables for
        each call, and a graph has its own."""
        batch = arguments.get(ARGUMENT)
        if batch is None or batch.bucket is None or not has_own_forward(self._original):
            return super().call(arguments)
        hidden = self.encoder(arguments["inputs_embeds"], **{ARGUMENT: batch})[0]
        pooled = None if self.pooler is None else self.pooler(hidden)
        outputs = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden, pooler_output=pooled
        )
        return outputs if self.asked(arguments, "return_dict") else outputs.to_tuple()


class Head(heads.Roberta):
    def vocabulary(self) -> Any:
        """With the bias, which lies beside it."""
        read = read_linear(self.lm_head.decoder)
        if not isinstance(read, Weights):
            return self.lm_head.decoder
        return Weights(read.weight, self.lm_head.bias)

    def transform(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
        head = self.lm_head
        return head.dense, nn.functional.gelu, head.layer_norm


FAMILY = Family(
    "ESM-2",
    "Esm",
    "transformers.models.esm.modeling_esm",
    bert.classes("Esm", Layer, Encoder, Model),
    {"EsmForMaskedLM": Head},
    layer="pre-norm, rotary",
    original="transformers 5.0; " + rotary.ORIGINAL,
)
