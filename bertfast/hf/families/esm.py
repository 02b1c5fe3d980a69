"""ESM-2: pre-norm, with rotary positions or absolute ones. Its embeddings know how much of a row is
masked: so they always see the padded batch, and the encoder packs what they give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...nn.modules import Weights, read_linear
from ...nn.parts import Parts
from .. import bert, heads, model, rotary
from ..family import Family


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
    GRAPHS = False  # they would keep one batch's tables


class Model(rotary.Model, bert.Model):
    def rotary_module(self) -> Any:
        return self.rotary_embeddings

    def before_packing(self, arguments: dict) -> None:
        if arguments.get("inputs_embeds") is None:
            names = ("input_ids", "attention_mask", "position_ids")
            given = {name: arguments.pop(name, None) for name in names}
            arguments["inputs_embeds"] = self.embeddings(**given)
        super().before_packing(arguments)


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
