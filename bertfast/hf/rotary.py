"""Rotary positions: a model's own tables, in the form that attention takes, and which positions
bertfast knows.

A model's rotary module gives the cosines and sines of some positions, (1, positions, head_dim),
whose halves are alike. It is asked for those of a sequence that begins at 0: so they have its
frequencies, its scaling and its rounding. Attention counts positions from each sequence's first
token; only differences of positions matter to a score.
"""

import sys
from typing import Any

import torch

from .. import tracing
from ..nn.eligibility import Facts
from ..nn.modules import has_own_forward
from ..nn.parts import NO_POSITIONS, Positions
from ..packing.batch import Batch
from . import layer, model

# Kinds of frequencies that are the same for every length.
_FIXED = frozenset(("default", "linear", "yarn", "llama3"))

# What runs the original code of all models with them, for the README's table.
ORIGINAL = "`position_ids` that don't count from 0"


class Layer(layer.Layer):
    """One that is given position_embeddings, or None where its model has absolute positions."""

    def positions(self, batch: Batch, args: tuple, kwargs: dict) -> Positions:
        given = kwargs.get("position_embeddings")
        if given is None:
            return NO_POSITIONS
        return batch.once(given[0], lambda: _tables(given))


def _tables(given: tuple[torch.Tensor, torch.Tensor]) -> Positions:
    cos, sin = (table[0, :, : table.shape[-1] // 2].float().contiguous() for table in given)
    return Positions(rotary=(cos, sin))


def tables(module: Any, batch: Batch, x: torch.Tensor, *kind: str) -> Any:
    """position_embeddings by a rotary module, for layers (of a kind) that take x."""

    def make() -> Any:
        return module(x, torch.arange(batch.longest(x), device=x.device)[None], *kind)

    return batch.once(module, make, *kind)


class Model(model.Model):
    """One with a rotary module."""

    def rotary_module(self) -> Any:
        """None where positions are absolute."""
        raise NotImplementedError

    def knows_distances(self) -> bool:
        return self.rotary_module() is not None

    def _find(self) -> Facts:
        facts, module = super()._find(), self.rotary_module()
        return facts if module is None else facts._replace(tables=(module,))

    def before_packing(self, arguments: dict) -> None:
        super().before_packing(arguments)
        if self.rotary_module() is not None:
            # They are known to be those that the model makes without them. Its tables then hold
            # the positions from 0 on, whichever sequence comes first.
            arguments["position_ids"] = None

    @classmethod
    def missing(cls, original: type) -> str | None:
        name = _rotary_name(original)
        return None if hasattr(sys.modules[original.__module__], name) else name

    @classmethod
    def own_kinds(cls, original: type) -> tuple[type, ...]:
        family = sys.modules[original.__module__]
        return (*super().own_kinds(original), getattr(family, _rotary_name(original)))

    def why_untold(self) -> str | None:
        return super().why_untold() or _why_unknown(self.rotary_module(), self._own_kinds[-1])

    def _attributes(self) -> list[tuple[dict, str]]:
        rotary = self.rotary_module()
        more = [] if rotary is None else [(vars(rotary), "rope_type")]
        return [*super()._attributes(), *more]

    def _why_original(self, arguments: dict, facts: Facts) -> str | None:
        reason = super()._why_original(arguments, facts)
        ids = arguments.get("position_ids")
        if reason is not None or ids is None or self.rotary_module() is None:
            return reason
        if _count_tokens(ids, arguments.get("cu_seq_lens_q")):
            return None
        return "position_ids don't count each row's tokens from 0"


def _rotary_name(original: type) -> str:
    return original.__name__.removesuffix("Model") + "RotaryEmbedding"


def _why_unknown(rotary: Any, kind: Any) -> str | None:
    if rotary is None:
        return None
    if type(rotary) is not kind:
        return f"its {kind.__name__} is a {type(rotary).__name__}"
    if not has_own_forward(kind):
        return f"the forward of {kind.__name__} was replaced"
    told = rotary.rope_type
    types = set(told.values()) if isinstance(told, dict) else {told}
    if not types <= _FIXED:
        other, *_ = sorted(types - _FIXED)
        return f"its rotary frequencies ({other}) may depend on the length"
    return None


def _count_tokens(ids: torch.Tensor, cu_seqlens: torch.Tensor | None) -> bool:
    """True if position_ids are known to be those that a model takes where none are given, or of
    packed rows, whose sequences each begin at 0."""
    if not tracing.can_look_at(ids):
        return False
    expected = torch.arange(ids.shape[-1], device=ids.device)
    if cu_seqlens is not None:
        starts = cu_seqlens.to(ids.device, torch.int64)
        restarted = expected - starts[torch.searchsorted(starts, expected, right=True) - 1]
        if bool((ids == restarted).all()):
            return True
    return bool((ids == expected).all())
