"""The tile list of a packed batch: made once, used by every layer and its backward.

Attention works on a packed batch in tiles of 64 tokens, or of 32 where sequences are very short.
Short sequences share a tile, whole, as many neighbours as fit; a longer one is cut into tiles of
its own. So every program has work, and most of a tile's scores are useful (`useful_share`).
"""

import functools
from dataclasses import dataclass, replace

import torch

from ..tracing import on_host
from .lengths import Run, equal_runs

SMALL_TILE, TILE = 32, 64
STEP = 32  # keys (or queries) at a time at a sequence's end


def tile_size(batch: int, max_seqlen: int, total: int | None) -> int:
    """32 where sequences have 32 tokens or fewer, on average if that is known: a tile of 64 would
    then be mostly scores between different sequences."""
    longest = max_seqlen if total is None else min(max_seqlen, total // max(batch, 1))
    return SMALL_TILE if longest <= SMALL_TILE else TILE


@dataclass(frozen=True)
class Plan:
    """The tiles of a packed batch, made by `plan` or `lay_out`.

    tiles: int32 (n, 3): sequence, first position in it, number of sequences (0: no tile). count:
    int32 (1,), how many of them there are. Both lie where cu_seqlens does. tile: their size in
    tokens. total: the number of tokens, if it is known. bounds: on a CPU, a copy of cu_seqlens.
    """

    tiles: torch.Tensor
    count: torch.Tensor
    tile: int
    sequences: int
    max_seqlen: int
    total: int | None = None
    bounds: torch.Tensor | None = None

    @functools.cached_property
    def runs(self) -> tuple[Run, ...] | None:
        """The runs of sequences of one length; None where the host doesn't know the lengths."""
        if self.bounds is None or not on_host(self.bounds):
            return None
        return equal_runs(self.bounds.numpy())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Plan":
        tiles, count = (t.to(device, non_blocking=non_blocking) for t in (self.tiles, self.count))
        return replace(self, tiles=tiles, count=count, bounds=None)

    def check(
        self, cu_seqlens: torch.Tensor, max_seqlen: int, tokens: int, name: str = "q"
    ) -> None:
        """Raises ValueError unless this can be the plan of a batch whose tensors (`name`) have so
        many tokens. On a GPU the lengths can't be looked at."""
        if self.sequences != cu_seqlens.shape[0] - 1:
            raise ValueError(
                f"plan must be made from cu_seqlens: it has {self.sequences} sequences, "
                f"cu_seqlens {cu_seqlens.shape[0] - 1}"
            )
        if self.max_seqlen != max_seqlen:
            raise ValueError(
                f"plan must be made with max_seqlen {max_seqlen}, got one of {self.max_seqlen}"
            )
        if self.tiles.device != cu_seqlens.device:
            raise ValueError(
                f"plan must be on {cu_seqlens.device} (where cu_seqlens is), "
                f"got {self.tiles.device}"
            )
        if self.total is not None and self.total != tokens:
            raise ValueError(
                f"plan must be made for {tokens} tokens ({name}'s), got one for {self.total}"
            )
        if self.bounds is not None and on_host(cu_seqlens):
            if not torch.equal(self.bounds, cu_seqlens):
                raise ValueError("plan must be made from cu_seqlens: it has other lengths")


def useful_share(cu_seqlens: torch.Tensor, plan: Plan, step: int = STEP) -> float:
    """Of the scores that attention computes for a batch, the part between tokens of one sequence.

    A tile of queries meets the keys of its sequence, or of all that share it, rounded up to a
    step; in the pass that owns keys, queries and keys change places. Reads the plan on the host.
    """
    bounds = cu_seqlens.tolist()
    useful = sum((end - start) ** 2 for start, end in zip(bounds, bounds[1:], strict=False))
    computed = 0
    for sequence, _, many in plan.tiles[: int(plan.count)].tolist():
        length = bounds[sequence + many] - bounds[sequence]
        computed += plan.tile * -(-length // step) * step
    return useful / computed if computed else 1.0
