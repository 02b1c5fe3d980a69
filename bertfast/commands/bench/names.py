"""A BertLayer's parameters under the names that other libraries give them.

A table has the other's name, up to "weight" or "bias", and the BertLayer's modules whose parameters
lie there, one below the other.
"""

from collections.abc import Mapping

import torch
from torch import nn

Table = Mapping[str, tuple[str, ...]]

_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")

TORCH: Table = {  # torch.nn.TransformerEncoderLayer
    "self_attn.in_proj_": _QKV,
    "self_attn.out_proj.": ("attention.output.dense",),
    "norm1.": ("attention.output.LayerNorm",),
    "linear1.": ("intermediate.dense",),
    "linear2.": ("output.dense",),
    "norm2.": ("output.LayerNorm",),
}
TRANSFORMER_ENGINE: Table = {  # its TransformerLayer with output_layernorm
    "self_attention.qkv.": _QKV,
    "self_attention.proj.": ("attention.output.dense",),
    "layernorm_mlp.layer_norm_": ("attention.output.LayerNorm",),
    "layernorm_mlp.fc1_": ("intermediate.dense",),
    "layernorm_mlp.fc2_": ("output.dense",),
    "layernorm.": ("output.LayerNorm",),
}


def to_theirs(layer: nn.Module, table: Table) -> dict[str, torch.Tensor]:
    """The parameters of a BertLayer by the other's names."""
    return {
        prefix + kind: torch.cat(
            [layer.get_submodule(module).get_parameter(kind).detach() for module in modules]
        )
        for prefix, modules in table.items()
        for kind in ("weight", "bias")
    }


def to_ours(theirs: Mapping[str, torch.Tensor], table: Table) -> dict[str, torch.Tensor]:
    """The other's tensors by the BertLayer's names. What isn't in the table keeps its name."""
    ours = dict(theirs)
    for prefix, modules in table.items():
        for kind in ("weight", "bias"):
            if prefix + kind in theirs:
                parts = ours.pop(prefix + kind).chunk(len(modules))
                ours |= {
                    f"{module}.{kind}": part for module, part in zip(modules, parts, strict=True)
                }
    return ours
