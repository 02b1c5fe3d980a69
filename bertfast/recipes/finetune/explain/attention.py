"""Attention weights of each layer and head, by transformers' own code."""

from typing import Any

import torch
from torch import nn

from .encoded import Encoded, of_transformers


def weights_of(model: nn.Module, encoded: Encoded) -> torch.Tensor | None:
    """(layers, heads, tokens, tokens), float32 on the host, each row a token that attends. None if
    the model gives none, or not one for each pair of the text's tokens."""
    inner: Any = of_transformers(model)
    if inner.config._attn_implementation != "eager":
        inner.set_attn_implementation("eager")  # no other one has the weights
    with torch.no_grad():
        made = model(**encoded.inputs, output_attentions=True, return_dict=True)
    layers = [layer for layer in made.attentions or () if layer is not None]
    size = (len(encoded), len(encoded))
    if not layers or any(layer.ndim != 4 or layer.shape[2:] != size for layer in layers):
        return None
    if len({layer.shape[1] for layer in layers}) > 1:
        return None
    return torch.cat([layer.float().cpu() for layer in layers])
