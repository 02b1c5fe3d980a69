"""The tile list of a packed batch: made once, used by every layer and its backward.

Attention works on a packed batch in tiles of 64 tokens, or of 32 where sequences are very short.
Short sequences share a tile, whole, as many neighbours as fit; a longer one is cut into tiles of
its own. So no program finds nothing to do, and most of a tile's scores are useful
(`useful_share`). `plan` computes everything on the device, without waiting for it: the list has
room for the most that there can be, and what is left over is empty. Where the host knows the
lengths, `lay_out` is cheaper.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .. import checks

SMALL_TILE, TILE = 32, 64
STEP = 32  # keys (or queries) at a time at a sequence's end


def tile_size(batch: int, max_seqlen: int, total: int | None) -> int:
    """32 where sequences have 32 tokens or fewer, on average if that is known: a tile of 64 would
    then be mostly scores between different sequences."""
    longest = max_seqlen if total is None else min(max_seqlen, total // max(batch, 1))
    return SMALL_TILE if longest <= SMALL_TILE else TILE


@dataclass(frozen=True)
class Plan:
    """tiles: int32 (n, 3): sequence, first position in it, number of sequences (0: no tile).
    count: int32 (1,), how many of them there are. Both lie where cu_seqlens does.
    tile: their size in tokens."""

    tiles: torch.Tensor
    count: torch.Tensor
    tile: int
    sequences: int
    max_seqlen: int
    total: int | None = None  # number of tokens, where it is known
    # On a CPU: the runs of sequences of one length, and a copy of the cu_seqlens behind them.
    runs: "tuple[Run, ...] | None" = None
    bounds: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Plan":
        tiles, count = (t.to(device, non_blocking=non_blocking) for t in (self.tiles, self.count))
        return replace(self, tiles=tiles, count=count, runs=None, bounds=None)

    def check(
        self, cu_seqlens: torch.Tensor, max_seqlen: int, tokens: int, name: str = "q"
    ) -> None:
        """That this can be the plan of a batch, whose tensors (`name`) have so many tokens; on a
        GPU the lengths can't be looked at."""
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
        if self.bounds is not None and readable(cu_seqlens):
            if not torch.equal(self.bounds, cu_seqlens):
                raise ValueError("plan must be made from cu_seqlens: it has other lengths")


def plan(cu_seqlens: torch.Tensor, max_seqlen: int, total: int | None = None) -> Plan:
    """The tile list of the packed batch whose sequence b has tokens cu_seqlens[b] to [b + 1].

    total: the number of tokens, which a caller knows without waiting for the device: packed
    tensors' first size. Without it the list has room for sequences of max_seqlen each, whose empty
    part costs a little, and the tiles' size goes by max_seqlen alone.
    """
    checks.check_cu_seqlens(cu_seqlens)
    checks.check_max_seqlen(max_seqlen)
    if total is not None:
        checks.check_int("total", total, 0, checks.INT32_MAX)
    known, runs, bounds = total, None, None
    if readable(cu_seqlens):
        values = cu_seqlens.tolist()
        check_bounds(values, max_seqlen, total, "total")
        known, runs, bounds = values[-1], equal_runs(values), cu_seqlens.clone()
    batch, device = cu_seqlens.shape[0] - 1, cu_seqlens.device
    tile = tile_size(batch, max_seqlen, total)
    room = batch * (-(-max_seqlen // tile))
    if known is not None:
        room = min(room, -(-known // tile) + batch)
    if room == 0:
        tiles = torch.zeros((0, 3), dtype=torch.int32, device=device)
        count = torch.zeros(1, dtype=torch.int32, device=device)
        return Plan(tiles, count, tile, batch, max_seqlen, known, runs, bounds)
    cu = cu_seqlens.to(torch.int64)
    index = torch.arange(batch + 1, device=device)

    # 1. Were a group to start at sequence i, it would end before sequence `after[i]`.
    after = torch.searchsorted(cu, cu + tile, right=True) - 1
    after = torch.maximum(after, index + 1).clamp(max=batch)

    # 2. Which sequences start a group: those that are reached from 0 by steps of `after`. After
    # round n all within 2^n steps are marked.
    head = (index == 0).to(torch.int32)
    jump = after
    for _ in range(batch.bit_length()):
        head = head.scatter_reduce(0, jump, head, "amax")
        jump = jump[jump]

    # 3. The tiles of each group, and the list of all.
    groups = torch.where(head[:-1] > 0, cu[after[:-1]] - cu[:-1], 0)
    ends = ((groups + tile - 1) // tile).cumsum(0)
    slot = torch.arange(room, device=device)
    owner = torch.searchsorted(ends, slot, right=True).clamp(max=batch - 1)
    before = torch.where(owner > 0, ends[owner - 1], 0)
    inside = slot < ends[-1]
    columns = (owner, (slot - before) * tile, after[owner] - owner)
    tiles = torch.stack([torch.where(inside, column, 0) for column in columns], 1)
    tiles, count = tiles.to(torch.int32), ends[-1:].to(torch.int32)
    return Plan(tiles, count, tile, batch, max_seqlen, known, runs, bounds)


def lay_out(
    lengths: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, Plan]:
    """cu_seqlens and the plan of a batch whose lengths the host knows: made there, and brought to
    the device in one copy, where `plan` would launch some fifty small kernels."""
    lengths, device = (
        checks.check_ints("lengths", lengths, 0),
        checks.check_device("device", device),
    )
    bounds = [0, *itertools.accumulate(lengths)]
    if bounds[-1] > checks.INT32_MAX:
        raise ValueError(f"lengths must add up to 2**31 - 1 or less, got {bounds[-1]}")
    batch, longest = len(lengths), max(lengths, default=0)
    tile = tile_size(batch, longest, bounds[-1])
    tiles: list[int] = []
    first = 0
    while first < batch:
        after = first + 1
        while after < batch and bounds[after + 1] - bounds[first] <= tile:
            after += 1
        for position in range(0, bounds[after] - bounds[first], tile):
            tiles += (first, position, after - first)
        first = after
    # All in one tensor, each part where 16 bytes begin.
    at = -(-len(bounds) // 4) * 4
    numbers = bounds + [0] * (at - len(bounds)) + [len(tiles) // 3, 0, 0, 0] + tiles
    everything = torch.tensor(numbers, dtype=torch.int32, device="cpu")
    everything = everything.to(device, non_blocking=True)
    cu_seqlens, count = everything[: batch + 1], everything[at : at + 1]
    made = Plan(everything[at + 4 :].view(-1, 3), count, tile, batch, longest, bounds[-1])
    if everything.device.type == "cpu":
        made = replace(made, runs=equal_runs(bounds), bounds=cu_seqlens.clone())
    return cu_seqlens, made


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


def readable(cu_seqlens: torch.Tensor) -> bool:
    """Whether the lengths can be looked at without waiting: on a CPU, and not while tracing."""
    return (
        type(cu_seqlens) is torch.Tensor
        and cu_seqlens.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def check_bounds(bounds: list[int], max_seqlen: int, total: int | None, name: str) -> None:
    """That these can be cu_seqlens' values. total: where they must end, and `name` what says so."""
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0, got {bounds[0]}")
    if min(lengths, default=0) < 0:
        raise ValueError("cu_seqlens must not decrease")
    if total is not None and total != bounds[-1]:
        raise ValueError(f"cu_seqlens must end at {total}, {name}, got {bounds[-1]}")
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least the longest sequence, {longest}, got {max_seqlen}"
        )


class Run(NamedTuple):
    """Neighbouring sequences of one length."""

    sequence: int  # the first of them
    token: int  # its first
    count: int  # how many
    length: int


def equal_runs(bounds: list[int]) -> tuple[Run, ...]:
    """All runs but those of empty sequences."""
    runs: list[Run] = []
    for sequence, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        length = end - start
        if length == 0:
            continue
        last = runs[-1] if runs else None
        if last and last.length == length and last.sequence + last.count == sequence:
            runs[-1] = last._replace(count=last.count + 1)
        else:
            runs.append(Run(sequence, start, 1, length))
    return tuple(runs)
