"""Attention weights of each layer and head, by transformers' own code."""

from typing import Any

import torch
from torch import nn

from .encoded import Encoded, of_transformers


def weights_of(model: nn.Module, encoded: Encoded) -> torch.Tensor | None:
    """(layers, heads, tokens, tokens), float32 on the host, each row a token that attends. None if
    the model gives none, or not one for each pair of the text's tokens. What an adapter puts before
    the text is left out, and then rows don't sum to 1."""
    inner: Any = of_transformers(model)
    if inner.config._attn_implementation != "eager":
        inner.set_attn_implementation("eager")  # no other one has the weights
    with torch.no_grad():
        made = model(**encoded.inputs, output_attentions=True, return_dict=True)
    size = len(encoded)
    layers = [layer[..., -size:, -size:] for layer in made.attentions or () if layer is not None]
    if not layers or len({layer.shape[:2] for layer in layers}) > 1:
        return None
    if any(layer.shape[2:] != (size, size) for layer in layers):
        return None
    return torch.cat([layer.float().cpu() for layer in layers])
