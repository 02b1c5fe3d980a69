"""Hugging Face's BERT-like models: the swapped classes, by the names of the original ones.

A converted module keeps its parameters, children, hooks and class name; only its class becomes a
subclass of the original one, found here by name, so that pickles find it too:
`bertfast.hf.BertLayer` is made from transformers' BertLayer when it is first asked for. Which
classes there are stands in `families/`, a file each.

Importing this also makes attn_implementation="bertfast" known to transformers (see attention.py).
"""

import importlib
import inspect
from typing import Any

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"bertfast needs transformers 5.0 or newer for Hugging Face models, found "
        f"{transformers.__version__}"
    )

from ..settings import is_converted  # noqa: E402
from . import attention, heads, model, sparse_encoder  # noqa: E402
from .families import FAMILIES  # noqa: E402

__all__ = [
    "attention",
    "head_class",
    "heads_known",
    "sparse_encoder_class",
    "swapped_class",
    "why_model_unknown",
    "why_unknown",
]

_TABLE: dict[str, tuple[str, Any]] = {
    name: (family.module, front) for family in FAMILIES for name, front in family.swapped.items()
}
_HEADS: dict[str, tuple[str, Any]] = {
    name: (family.module, front) for family in FAMILIES for name, front in family.heads.items()
}
_LIBRARYS: dict[str, tuple[str, Any]] = {
    "SparseEncoder": ("sentence_transformers.sparse_encoder.model", sparse_encoder.SparseEncoder)
}
_classes: dict[str, type] = {}


def __getattr__(name: str) -> type:
    known = _TABLE.get(name) or _HEADS.get(name) or _LIBRARYS.get(name)
    if known is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _classes:
        module, mixin = known
        original = getattr(importlib.import_module(module), name)
        # Two threads may get here: there must be one class.
        _classes.setdefault(name, mixin.subclass(original, __name__))
    return _classes[name]


def swapped_class(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class that a module's is swapped for, if it is exactly one that bertfast knows."""
    kind = type(module)
    known = _TABLE.get(kind.__name__)
    if known is None or kind.__module__ != known[0] or why_unknown(kind) is not None:
        return None
    return __getattr__(kind.__name__)


def head_class(module: torch.nn.Module, loss: bool = True) -> type[torch.nn.Module] | None:
    """The class for a masked language model's head: the module's own if it was swapped already;
    None if it is no such head. loss: it shall make its loss, and be known to make it as ours do."""
    kind = type(module)
    if isinstance(module, heads.Head):
        return kind if module.is_known(module._original) or not loss else None
    known = _HEADS.get(kind.__name__)
    if known is None or kind.__module__ != known[0]:
        return None
    return __getattr__(kind.__name__) if known[1].is_known(kind) or not loss else None


def sparse_encoder_class(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class for a SparseEncoder of sentence-transformers that pools the logits of a masked
    language model; the module's own if it was swapped already."""
    kind = type(module)
    if isinstance(module, sparse_encoder.SparseEncoder):
        return kind
    known = _LIBRARYS.get(kind.__name__)
    if known is None or kind.__module__ != known[0]:
        return None
    pools = any(map(sparse_encoder.is_splade, sparse_encoder.chains(module)))
    return __getattr__(kind.__name__) if pools else None


def heads_known() -> str:
    """The names of these heads, to be told."""
    return ", ".join(_HEADS)


def why_unknown(kind: Any) -> str | None:
    """Why a class of a known name isn't the class that bertfast knows: its forward takes other
    arguments, as that of another version of transformers may."""
    if kind.__name__ not in _TABLE or kind.__module__ != _TABLE[kind.__name__][0]:
        return None
    parameters = list(inspect.signature(kind.forward).parameters.values())
    names = [parameter.name for parameter in parameters[1:]]
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    # Up to transformers 4 a layer's third argument was head_mask, and it returned a tuple.
    front = _TABLE[kind.__name__][1]
    passes_on = passes_on or not front.PASSES_ON
    if (missing := front.missing(kind)) is not None:
        return f"transformers has no {missing} here, which bertfast knows of newer versions"
    if set(front.TAKES) <= set(names) and passes_on and "head_mask" not in names:
        return None
    given = ", ".join(names)
    return (
        f"its forward takes ({given}), which is none that bertfast knows, up to transformers 5.23"
    )


def why_model_unknown(module: object) -> str | None:
    """Why a model of a known family doesn't tell its layers how the batch lies, so that they run
    their original code wherever there is a mask; None if it does, or is no such model."""
    for kind in type(module).__mro__:
        known = _TABLE.get(kind.__name__)
        if known is None or kind.__module__ != known[0] or not issubclass(known[1], model.Model):
            continue
        if isinstance(module, model.Model):
            return None if is_converted(module) else f"its {kind.__name__} is not converted"
        if type(module) is kind:
            return why_unknown(kind) or f"its {kind.__name__} is not converted"
        return (
            f"its {type(module).__name__} is a subclass of {kind.__name__}, "
            "whose forward bertfast doesn't know"
        )
    return None
