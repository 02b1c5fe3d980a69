"""The parts of layers with the names of Hugging Face's BertLayer, and the GELU of an activation."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..ops.bias_gelu import APPROXIMATE
from .modules import untouched
from .parts import Parts


def bert_parts(layer: nn.Module, norms_first: tuple[nn.Module, nn.Module] | None = None) -> Parts:
    """The parts of a layer with the names of Hugging Face's BertLayer. norms_first: of a pre-norm
    layer, the LayerNorms before its two blocks."""
    # By the dicts of modules, as attributes of a Module take three times as long.
    modules: dict[str, Any] = layer._modules
    attention, intermediate = modules["attention"]._modules, modules["intermediate"]._modules
    attend, attended, output = attention["self"], attention["output"]._modules, modules["output"]
    inside, output = attend._modules, output._modules
    activation = intermediate.get("intermediate_act_fn")
    if activation is None:  # a plain function
        activation = modules["intermediate"].intermediate_act_fn
    scale = attend.__dict__.get("scaling")
    return Parts(
        inside["query"],
        inside["key"],
        inside["value"],
        inside["dropout"].p if attend.training else 0.0,
        attended["dense"],
        attended["dropout"],
        attended["LayerNorm"] if norms_first is None else norms_first[0],
        intermediate["dense"],
        activation,
        gelu_form(activation),
        output["dense"],
        output.get("dropout"),
        output["LayerNorm"] if norms_first is None else norms_first[1],
        attend.num_attention_heads,
        attend.attention_head_size**-0.5 if scale is None else scale,
        norm_first=norms_first is not None,
    )


def gelu_form(activation: Callable) -> str | None:
    """ "none" for the exact GELU, "tanh" for its tanh form, None for any other function."""
    if isinstance(activation, nn.Module) and not untouched(activation, type(activation)):
        return None
    if type(activation) is nn.GELU:
        return activation.approximate
    if activation is nn.functional.gelu:
        return "none"
    if type(activation) is functools.partial:
        known = activation.func is nn.functional.gelu and not activation.args
        if not known or activation.keywords.keys() - {"approximate"}:
            return None
        form = activation.keywords.get("approximate", "none")
        return form if form in APPROXIMATE else None
    return _GELU_CLASSES.get(_name(activation))


def gating_form(activation: Callable) -> str | None:
    """The name of a gated MLP's activation in ops.gated, None for any other function."""
    if isinstance(activation, nn.Module) and _name(activation) in _SILU:
        return "silu" if untouched(activation, type(activation)) else None
    form = gelu_form(activation)
    return None if form is None else _GATED[form]


def _name(activation: Callable) -> tuple[str, str]:
    return type(activation).__module__, type(activation).__name__


# transformers' activations, by name, as this module works without transformers.
_GELU_CLASSES = {
    ("transformers.activations", name): form
    for name, form in (
        ("GELUActivation", "none"),
        ("GELUTanh", "tanh"),
        ("PytorchGELUTanh", "tanh"),
        ("NewGELUActivation", "tanh"),
        ("FastGELUActivation", "tanh"),
    )
}
_SILU = (
    ("torch.nn.modules.activation", "SiLU"),
    ("transformers.activations", "SiLUActivation"),
)
_GATED = {"none": "gelu", "tanh": "gelu_tanh"}
