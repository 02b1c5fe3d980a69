"""BERT's layer and model, which many families have under their own names."""

import sys
from typing import Any

import torch
from torch import nn

from ..nn.bert import bert_parts
from ..nn.modules import has_own_forward
from ..nn.parts import Parts
from . import layer, model
from .layer import ARGUMENT


class Layer(layer.Layer):
    @classmethod
    def container_kinds(cls, original: type) -> tuple[type, ...]:
        family: Any = sys.modules[original.__module__]
        prefix = original.__name__.removesuffix("Layer")
        names = ("Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output")
        return tuple(getattr(family, prefix + name) for name in names)

    def parts(self) -> Parts:
        return bert_parts(self)

    def containers(self) -> tuple[nn.Module, ...]:
        modules: dict[str, Any] = self._modules
        inside = modules["attention"]._modules
        return (
            *(modules["attention"], inside["self"], inside["output"]),
            *(modules["intermediate"], modules["output"]),
        )

    def self_attention(self) -> nn.Module:
        return self.attention.self

    def attributes(self) -> list[tuple[dict, str]]:
        return [(vars(self), "is_decoder"), (vars(self), "chunk_size_feed_forward")]

    def why_not(self) -> str | None:
        if getattr(self, "is_decoder", False):  # some families have none
            return "it is a decoder's"
        if self.chunk_size_feed_forward:
            return "chunk_size_feed_forward is set"
        return super().why_not()


class PreNormLayer(Layer):
    """One whose LayerNorms come before its blocks, and may be anywhere in it."""

    def norms(self) -> tuple[nn.Module, nn.Module]:
        """The one before the attention, and the one before the MLP."""
        raise NotImplementedError

    def parts(self) -> Parts:
        return bert_parts(self, self.norms())


class Model(model.Model):
    def encoder_module(self) -> nn.Module:
        return self.encoder

    def position_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """As the embeddings would number a padded batch."""
        embeddings = self.embeddings
        if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa's skip padding
            return embeddings.create_position_ids_from_input_ids(input_ids, embeddings.padding_idx)
        return embeddings.position_ids[:, : input_ids.shape[1]]


class WrittenOut(Model):
    """One whose original hands on no argument that it doesn't know, so that its forward is written
    out here."""

    PASSES_ON = False
    OUTPUTS: Any  # the class of what it returns

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
        return self.OUTPUTS(
            last_hidden_state=hidden, pooler_output=pooled, hidden_states=encoded.hidden_states
        )


def added_mask(hidden_states: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask of the keys as eager attention adds it to scores."""
    if key_mask is None:
        return None
    least = torch.finfo(hidden_states.dtype).min
    return hidden_states.new_zeros(key_mask.shape).masked_fill(~key_mask, least)[:, None, None]


def classes(
    prefix: str,
    layer: type[Layer] = Layer,
    encoder: type[model.Encoder] = model.Encoder,
    whole: type[Model] = Model,
) -> dict[str, Any]:
    """Of a family whose classes are named as BERT's: each name, and what is put in front of it."""
    return {prefix + "Layer": layer, prefix + "Encoder": encoder, prefix + "Model": whole}
