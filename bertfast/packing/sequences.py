"""The places of a batch's sequences, in the form that attention takes."""

from typing import NamedTuple

import torch

from ..tracing import is_exporting
from .lengths import Run
from .tiles import Plan


class Sequences(NamedTuple):
    """Padded: a mask of the keys, or nothing where every token is attended. Packed: cu_seqlens and
    the longest length, and with a plan its tiles. All tensors are dense."""

    key_mask: torch.Tensor | None = None  # bool (rows, length)
    cu_seqlens: torch.Tensor | None = None  # int32 (sequences + 1)
    max_seqlen: int = 0
    tiles: torch.Tensor | None = None  # int32 (n, 3)
    tile: int = 0  # tokens of one
    plan: Plan | None = None  # only for the reference, which asks it for `runs`

    @property
    def runs(self) -> tuple[Run, ...] | None:
        """The runs of sequences of one length, where the host knows them."""
        return None if self.plan is None else self.plan.runs


def sequences_of(
    key_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    plan: Plan | None,
    tokens: int,
) -> Sequences:
    """The sequences of a call whose packed tensors have so many tokens."""
    if plan is None:
        return restored(key_mask, cu_seqlens, None, 0, max_seqlen, tokens)
    made = restored(None, cu_seqlens, plan.tiles, plan.tile, max_seqlen, tokens)
    return made._replace(plan=plan)


def restored(
    key_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    tiles: torch.Tensor | None,
    tile: int,
    max_seqlen: int | None,
    tokens: int,
) -> Sequences:
    """The sequences whose parts went through a registered op one by one."""
    if cu_seqlens is None:
        return Sequences(None if key_mask is None else key_mask.contiguous())
    tiles = None if tiles is None else tiles.contiguous()
    longest = tokens if max_seqlen is None else max_seqlen
    if not is_exporting():  # which refuses what depends on comparing a size
        longest = min(longest, tokens)  # no sequence is longer than all of them
    return Sequences(None, cu_seqlens.contiguous(), longest, tiles, tile)
