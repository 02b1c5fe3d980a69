"""sentence-transformers' SparseEncoder, its class swapped: SPLADE's vectors without logits.

    Transformer      a masked language model: the logits of all tokens     token_embeddings
    SpladePooling    the largest log1p(relu(logit)) of each text and word   sentence_embedding

Both are one here: the head is asked for vectors in place of logits (`heads.Wanted`), by the
Transformer's own call, and the pooling's is left out. So a call's features have no token_embeddings
afterwards. Only the class of the whole is swapped: its parts' are written into what it saves.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .. import tracing
from ..nn.hooks import has_global_hooks, is_replaced, sees_layout
from ..notice import warn_once
from ..settings import ATTRIBUTE, KEPT, is_converted, is_disabled
from .heads import Head, Wanted
from .layer import Swapped

LIBRARY = "sentence_transformers."
LOGITS, VECTORS, ASKED = "token_embeddings", "sentence_embedding", "labels"
_ACTIVATIONS = ("relu", "log1p_relu")


class SparseEncoder(Swapped):
    """Stands in front of the original class."""

    _original: Any

    @classmethod
    def subclass(cls, original: Any, module: str) -> type[nn.Module]:
        body = {
            "__module__": module,
            "__qualname__": original.__name__,
            "__doc__": original.__doc__,
            "_original": original,
            "forward": _forward(original),
        }
        return type(original.__name__, (cls, original), body)

    def heads(self) -> Iterator[nn.Module]:
        """The models whose logits it pools."""
        for chain in chains(self):
            if is_splade(chain):
                yield chain[0].model

    def why_logits(self, chain: Sequence[Any]) -> str | None:
        """Why these modules, which a call runs through, make logits; None if they needn't."""
        if has_global_hooks():
            return "a hook on all modules has to be called"
        if not _is_librarys(self._original.forward):
            return f"the forward of {self._original.__name__} was replaced"
        if getattr(self, "module_kwargs", None):
            return "its module_kwargs give its modules further arguments"
        for module in (*filter(_is_router, self.children()), *chain):
            kind = type(module)
            known = kind.__name__ in _KNOWN or _holds_model(module)
            if not (known and _is_librarys(kind)):
                return f"a {kind.__name__} may read the logits"
            if not _is_librarys(kind.forward):
                return f"the forward of {kind.__name__} was replaced"
            if sees_layout(module) or is_replaced(module):
                return f"a hook on its {kind.__name__} has to be called"
        transformer, pooling, *rest = chain
        if any(getattr(one, "module_input_name", VECTORS) != VECTORS for one in rest):
            return f"its {type(rest[0]).__name__} reads something else than vectors"
        strategy, activation = pooling.pooling_strategy, pooling.activation_function
        if strategy != "max" or activation not in _ACTIVATIONS:
            return f"its pooling is the {strategy} of {activation}"
        told = transformer.modality_config.get("text", {})
        output = told.get("method_output_name")
        output = output if isinstance(output, str) or output is None else ".".join(output)
        if (told.get("method"), output, transformer.module_output_name) != (
            *("forward", "logits"),
            LOGITS,
        ):
            return f"it makes {transformer.module_output_name} of the model's {output}"
        head = transformer.model
        name = type(head).__name__
        if not isinstance(head, Head):
            return f"its {name} is not converted, or has no head that bertfast knows"
        if not (is_converted(head) and head.__dict__[ATTRIBUTE].vectors):
            return f"its {name} is not converted"
        if sees_layout(head) or is_replaced(head):
            return f"a hook on its {name} sees its logits"
        return None

    def why_logits_now(self, chain: Sequence[Any], features: dict) -> str | None:
        """Why this call makes logits; None if it needn't."""
        if (reason := self.why_logits(chain)) is not None:
            return reason
        if (modality := features.get("modality", "text")) != "text":
            return f"its input is {modality}"
        if ASKED in features:
            return f"its features have {ASKED}"
        mask = features.get("attention_mask")
        if features.get("cu_seq_lens_q") is not None:
            return None if mask is None else "both attention_mask and cu_seq_lens_q were given"
        if not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            return "it was given no mask of the tokens"
        if mask.is_floating_point():
            return f"attention_mask is {mask.dtype}, whose values weigh the logits"
        return None

    def tell(self, reason: str | None) -> None:
        """Keeps for reports why a call made logits, and warns once."""
        self.__dict__[KEPT] = reason
        if reason is not None:
            name = self._original.__name__
            warn_once(f"makes the logits of all tokens in a {name}: {reason}")

    def note(self) -> str | None:
        """For reports, after its name."""
        for chain in filter(is_splade, chains(self)):
            reason = self.why_logits(chain) or chain[0].model.why_original()
            if reason is not None:
                return f"makes the logits of all tokens: {reason}"
        text = "makes its vectors without the logits of all tokens"
        if (reason := self.__dict__.get(KEPT)) is not None:
            return f"{text}; made them in its last call: {reason}"
        return text


def chains(encoder: nn.Module) -> Iterator[list[Any]]:
    """The modules that a call may run through: with a Router those of each route."""
    children: list[Any] = list(encoder.children())
    router = next(filter(_is_router, children), None)
    if router is None:
        yield children
        return
    for name in router.sub_modules:
        yield _by(router, name, children)


def chain_of(encoder: nn.Module, features: dict, options: dict) -> list[Any]:
    """The modules that this call runs through."""
    children: list[Any] = list(encoder.children())
    router = next(filter(_is_router, children), None)
    if router is None:
        return children
    told = {name: options.get(name) or features.get(name) for name in ("task", "modality")}
    return _by(router, router._resolve_route(**told), children)


def _by(router: Any, route: str, children: list[Any]) -> list[Any]:
    place = children.index(router)
    return [*children[:place], *router.sub_modules[route].children(), *children[place + 1 :]]


def _is_router(module: Any) -> bool:
    return type(module).__name__ == "Router" and hasattr(module, "_resolve_route")


def is_splade(chain: Sequence[Any]) -> bool:
    """True for a model of transformers and the pooling of its logits, whatever follows."""
    return len(chain) > 1 and _holds_model(chain[0]) and type(chain[1]).__name__ == "SpladePooling"


def _holds_model(module: Any) -> bool:
    """True for sentence-transformers' module around a model of transformers."""
    return hasattr(module, "transformer_task")


_KNOWN = ("SpladePooling", "Normalize", "Router")


def _is_librarys(written: Any) -> bool:
    return written.__module__.startswith(LIBRARY)


def _forward(original: Any) -> Callable:
    @functools.wraps(original.forward)
    def forward(self: SparseEncoder, input: dict, **kwargs: Any) -> dict:
        features = input
        if not is_converted(self) or is_disabled() or tracing.is_compiling():
            return original.forward(self, features, **kwargs)
        chain = chain_of(self, features, kwargs)
        if not is_splade(chain):
            return original.forward(self, features, **kwargs)
        transformer, pooling, *rest = chain
        if (reason := self.why_logits_now(chain, features)) is not None:
            self.tell(reason)
            return original.forward(self, features, **kwargs)
        features[ASKED] = wanted = Wanted()
        try:
            made = transformer(features)
        finally:
            del features[ASKED]
        self.tell(wanted.refused)
        if wanted.refused is not None:
            made = pooling(made)
        else:
            made[VECTORS] = vectors = twice(pooling, made.pop(LOGITS))
            if pooling.embedding_dimension is None:
                pooling.embedding_dimension = vectors.shape[1]
        for module in rest:
            made = module(made)
        return made

    return forward


def twice(pooling: Any, vectors: torch.Tensor) -> torch.Tensor:
    """With the second logarithm that a pooling may take."""
    if pooling.activation_function != "log1p_relu":
        return vectors
    return torch.log1p(vectors) if pooling.training else vectors.log1p_()
