"""A Hugging Face encoder layer, its class swapped: `run_layer` over its own modules."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..nn.eligibility import Facts, facts_of
from ..nn.hooks import has_user_hooks, is_replaced
from ..nn.joined import JoinedWeights
from ..nn.layer import Call, Parts, Positions, run_layer
from ..nn.modules import has_own_forward, is_spread
from ..nn.parts import NO_POSITIONS
from ..nn.per_token import why_rows_are_seen
from ..notice import warn_once
from ..packing.batch import Batch
from ..settings import ATTRIBUTE, is_converted, is_disabled

# The argument by which a converted model tells its layers how the batch lies: a Batch, or None for
# the original code. It is an argument, and not kept somewhere, so that a checkpointed layer that is
# run again in the backward is told the same.
ARGUMENT = "bertfast_batch"

# Arguments that change nothing in a layer that attends to itself only, without a cache.
_HARMLESS = frozenset(
    (
        "position_ids",  # the embeddings have used them
        "cache_position",
        "use_cache",
        "output_hidden_states",
        "return_dict",
        "num_items_in_batch",
        "encoder_attention_mask",
    )
)
# Arguments that transformers' layers or its attention functions look at. Any other is handed down
# without being read, unless the attention function is a user's.
_LOOKED_AT = frozenset(
    ("encoder_hidden_states", "past_key_values", "head_mask", "output_attentions", "is_causal")
    + ("sliding_window", "softcap", "s_aux", "position_bias", "cache", "dropout", "scaling")
    + ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
    + ("position_embeddings",)  # they may be of any positions
)
_IMPLEMENTATIONS = (None, "eager", "sdpa", "bertfast", "flex_attention") + tuple(
    f"flash_attention_{number}" for number in (2, 3, 4)
)


if TYPE_CHECKING:

    class AnyModule(nn.Module):
        """A module of transformers: an attribute may be anything."""

        def __getattr__(self, name: str) -> Any: ...
else:
    AnyModule = object


class Swapped(AnyModule):
    @classmethod
    def missing(cls, original: type) -> str | None:
        """The name of a class that this front needs of the family, where there is none."""
        return None


class Layer(Swapped):
    """Stands in front of the original layer class. A subclass names the layer's parts."""

    TAKES: tuple[str, ...] = (
        "hidden_states",
        "attention_mask",
    )  # arguments that the original's forward must know
    PASSES_ON = True  # and any other
    RETURNS_TUPLE = False  # (hidden states, attention weights)
    _original: Any  # the class that was swapped
    _container_kinds: tuple[type, ...]  # what containers() must be, class by class

    @classmethod
    def subclass(cls, original: Any, module: str) -> type[nn.Module]:
        body = {
            "__module__": module,
            "__qualname__": original.__name__,
            "__doc__": original.__doc__,
            "_original": original,
            "_container_kinds": cls.container_kinds(original),
            # In the class's own body: transformers wraps it there for gradient checkpointing.
            "forward": _forward(original),
        }
        return type(original.__name__, (cls, original), body)

    @classmethod
    def container_kinds(cls, original: type) -> tuple[type, ...]:
        raise NotImplementedError

    def parts(self) -> Parts:
        raise NotImplementedError

    def containers(self) -> tuple[nn.Module, ...]:
        """Modules whose forward isn't called: they must be what they were, and without hooks."""
        raise NotImplementedError

    def self_attention(self) -> nn.Module:
        raise NotImplementedError

    def positions(self, batch: Batch, args: tuple, kwargs: dict) -> Positions:
        """Of a call with these arguments after the mask."""
        return NO_POSITIONS

    def original_arguments(self, hidden_states: torch.Tensor, args: tuple) -> tuple:
        """A model's arguments after the mask, as the original code wants them."""
        return args

    def original_mask(self, hidden_states: torch.Tensor, key_mask: torch.Tensor | None) -> Any:
        """The mask as the original code wants it."""
        if key_mask is None:
            return None
        from transformers.masking_utils import create_bidirectional_mask

        attention: Any = self.self_attention()
        return create_bidirectional_mask(attention.config, hidden_states, key_mask)

    def why_not(self) -> str | None:
        """Why this layer runs its original code, whatever the call; None if it needn't."""
        if not has_own_forward(self._original):
            return f"the forward of {self._original.__name__} was replaced"
        for module, kind in zip(self.containers(), self._container_kinds, strict=True):
            if type(module) is not kind:
                return f"its {kind.__name__} is a {type(module).__name__}"
            if has_user_hooks(module):
                return f"a hook on its {kind.__name__} has to be called"
            if not has_own_forward(kind):
                return f"the forward of {kind.__name__} was replaced"
        if is_replaced(self):
            return "its forward was replaced on the instance"
        if is_spread(self):
            return "its modules are spread over several devices"
        return None

    def _find(self) -> Facts:
        return Facts(None, self.why_not())

    def _attributes(self) -> list[tuple[dict, str]]:
        return [(vars(self), "forward"), *self.attributes()]

    def attributes(self) -> list[tuple[dict, str]]:
        """The attributes that why_not() depends on: their dicts and names."""
        return []

    def why_rows_are_seen(self) -> str | None:
        """Why tokens must not change places in this layer; None if they may."""
        return why_rows_are_seen(self, (type(self), *self._container_kinds))

    def prepare(self) -> None:
        """Gives the layer the state that it needs besides its new class."""
        parts = self.parts()
        self.__dict__["_bertfast_joined"] = JoinedWeights((parts.query, parts.key, parts.value))
        if parts.gated is not None and parts.gated.gate is not None:
            self.__dict__[_JOINED_UP] = JoinedWeights((parts.gated.gate, parts.up))


_JOINED_UP = "_bertfast_joined_up"


def _forward(original: Any) -> Callable:
    @functools.wraps(original.forward)
    def forward(
        self: Layer,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if type(attention_mask) is Batch:  # of an encoder that hands down nothing else
            kwargs[ARGUMENT], attention_mask = attention_mask, None
        told = ARGUMENT in kwargs
        batch: Any = kwargs.pop(ARGUMENT) if told else _batch_of(self, attention_mask, args, kwargs)
        reason = batch if isinstance(batch, str) else None
        # A packed batch comes only from a model that has asked every layer, as a clean one does.
        if type(batch) is Batch and not (batch.packed or batch.clean):
            facts = facts_of(self, self._find, self._attributes)
            reason = facts.unfused
            if facts.clean:
                batch = dataclasses.replace(batch, clean=True)
        if batch is None or reason is not None:
            if reason:
                warn_once(f"runs the original code of a {original.__name__}: {reason}")
            if told and batch is not None:
                args = self.original_arguments(hidden_states, args)
                attention_mask = self.original_mask(hidden_states, batch.key_mask)
            return original.forward(self, hidden_states, attention_mask, *args, **kwargs)
        settings = self.__dict__[ATTRIBUTE]
        call = Call(
            *(batch, self._bertfast_joined, self.training),
            *(settings.backend, settings.recompute, id(self)),
            joined_up=self.__dict__.get(_JOINED_UP),
            positions=self.positions(batch, args, kwargs),
        )
        y = run_layer(self.parts(), hidden_states, call)
        return (y, None) if self.RETURNS_TUPLE else y

    return forward


def _batch_of(layer: Layer, attention_mask: Any, args: tuple, kwargs: dict) -> Batch | str:
    """The batch of a layer that is called by itself, outside a converted model; or the reason for
    its original code, "" if that needs no telling."""
    if is_disabled() or not is_converted(layer):
        return ""
    attention: Any = layer.self_attention()
    if any(value is not None and value is not False for value in args):
        return "it was given more than hidden_states and attention_mask"
    config = getattr(attention, "config", None)
    name = changes_layers(kwargs, config)
    if name is not None:
        return f"{name} was given"
    if attention._forward_hooks or getattr(config, "output_attentions", False):
        return "attention weights are recorded"
    if attention_mask is None:
        return Batch()
    if not isinstance(attention_mask, torch.Tensor):
        return f"attention_mask is a {type(attention_mask).__name__}, not a mask of the tokens"
    if attention_mask.dtype == torch.bool and attention_mask.ndim == 2:
        return Batch(key_mask=attention_mask)
    return (
        f"attention_mask is {attention_mask.ndim}-D of {attention_mask.dtype}, not a 2-D bool mask "
        "of the tokens, which a converted model hands over"
    )


def changes_layers(kwargs: dict, config: Any) -> str | None:
    """The name of an argument that asks a layer for something that bertfast doesn't do."""
    for name, value in kwargs.items():
        if value is None or value is False or name in _HARMLESS:
            continue
        implementation = getattr(config, "_attn_implementation", None)
        if name in _LOOKED_AT or implementation not in _IMPLEMENTATIONS:
            return name
    return None
