"""BERT's layer and model, which many families have under their own names."""

import sys
from typing import Any

import torch
from torch import nn

from ..nn.bert import bert_parts
from ..nn.parts import Parts
from . import layer, model


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
        if self.is_decoder:
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


def classes(
    prefix: str,
    layer: type[Layer] = Layer,
    encoder: type[model.Encoder] = model.Encoder,
    whole: type[Model] = Model,
) -> dict[str, Any]:
    """Of a family whose classes are named as BERT's: each name, and what is put in front of it."""
    return {prefix + "Layer": layer, prefix + "Encoder": encoder, prefix + "Model": whole}
