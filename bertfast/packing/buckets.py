"""Buckets: packed batches filled up to few sizes, each of which a CUDA graph can serve.

A bucket is a number of tokens and a size of tiles. How many sequences there are is no part of it:
its list of bounds and its list of tiles have room for any usual batch, and attention's programs
are as many as there is room for tiles. What the batch leaves of the tokens is filled by sequences
of their own, a tile each, so that no token of the batch shares a tile with one of them.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from .compiled import module
from .layout import tiles_of
from .tiles import Plan, tile_size

# Up to a number of tokens they go by steps: 36 rungs to 8192. With 32 mixed traffic wastes 5.2 %.
_STEPS = ((512, 64), (2048, 128), (4096, 256), (8192, 512), (16384, 1024), (32768, 2048))
MOST_TOKENS = _STEPS[-1][0]


def rungs(tokens: int, most: int = MOST_TOKENS) -> Iterator[int]:
    """The buckets' tokens from the first that holds so many, up to `most`."""
    below = 0
    for end, step in _STEPS:
        for rung in range(below + step, min(end, most) + 1, step):
            if rung >= tokens:
                yield rung
        below = end


class Bucket(NamedTuple):
    tokens: int
    tile: int

    @property
    def sequences(self) -> int:
        """Room for sequences, with those that fill it."""
        return self.tokens // 4 + 2

    @property
    def tiles(self) -> int:
        """Room for tiles. Sequences of any one length need two of `tile` for each of its tokens at
        most; a worse mixture takes the next bucket."""
        return 2 * self.tokens // self.tile + 2

    @property
    def count_at(self) -> int:
        """Place of the number of tiles: after the bounds, at a multiple of 16 bytes."""
        return -(-(self.sequences + 1) // 4) * 4

    @property
    def size(self) -> int:
        """Of all numbers, int32."""
        return self.count_at + 4 + 3 * self.tiles


class Filled(NamedTuple):
    """A batch's place in a bucket. numbers, int32, also where the batch is: the bounds of its
    sequences, of those that fill the bucket, and then its end again and again; the number of tiles;
    the tiles, then zeros."""

    bucket: Bucket
    numbers: torch.Tensor
    sequences: int  # of the batch itself, as all that follow
    tiles: int
    longest: int
    total: int

    def plan(self) -> tuple[torch.Tensor, Plan]:
        """cu_seqlens and the plan of the batch without what fills the bucket."""
        at, end = self.bucket.count_at, self.bucket.count_at + 4 + 3 * self.tiles
        cu_seqlens = self.numbers[: self.sequences + 1]
        known = cu_seqlens.clone() if self.numbers.device.type == "cpu" else None
        tiles, count = self.numbers[at + 4 : end].view(-1, 3), self.numbers[at : at + 1]
        sizes = self.bucket.tile, self.sequences, self.longest, self.total
        return cu_seqlens, Plan(tiles, count, *sizes, known)


def whole(bucket: Bucket, numbers: torch.Tensor) -> tuple[torch.Tensor, Plan]:
    """cu_seqlens and the plan of any batch that fills a bucket, whose numbers they are views of."""
    at = bucket.count_at
    tiles = numbers[at + 4 : bucket.size].view(-1, 3)
    sizes = bucket.tile, bucket.sequences, bucket.tokens, bucket.tokens
    plan = Plan(tiles, numbers[at : at + 1], *sizes)
    return numbers[: bucket.sequences + 1], plan


def fill(lengths: np.ndarray, device: torch.device, most: int = MOST_TOKENS) -> Filled | None:
    """The smallest bucket that holds a batch of these lengths, int64, for tensors on `device`; None
    if none does."""
    count, total = lengths.size, int(lengths.sum())
    if not 0 < total <= most:
        return None
    longest = int(lengths.max())
    tile = tile_size(count, longest, total)
    found = _numbers(lengths, tile, most)
    if found is None:
        return None
    bucket, numbers, tiles = found
    made = torch.from_numpy(numbers).to(device, non_blocking=True)
    return Filled(bucket, made, count, tiles, longest, total)


def _numbers(lengths: np.ndarray, tile: int, most: int) -> tuple[Bucket, np.ndarray, int] | None:
    """The smallest bucket, the numbers, and how many tiles are the batch's own."""
    buckets, rooms = _rooms(tile, most)
    compiled = module()
    if compiled is not None:
        found = compiled.fill(lengths, tile, rooms)
        return None if found is None else (buckets[found[0]], *found[1:])
    count = lengths.size
    bounds = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    total = int(bounds[-1])
    tiles = tiles_of(bounds, tile)
    for bucket in buckets:
        tokens = bucket.tokens
        if tokens < total:
            continue
        fillers = -(-(tokens - total) // tile)
        used = len(tiles) + fillers
        if count + fillers > bucket.sequences or used > bucket.tiles:
            continue
        numbers = np.zeros(bucket.size, dtype=np.int32)
        numbers[: count + 1] = bounds
        numbers[count + 1 : bucket.sequences + 1] = tokens
        ends = numbers[count + 1 : count + fillers]  # the last one ends where the bucket does
        ends[:] = np.arange(total + tile, total + tile * fillers, tile)
        at = bucket.count_at
        numbers[at] = used
        listed = numbers[at + 4 :].reshape(-1, 3)
        listed[: len(tiles)] = tiles
        listed[len(tiles) : used, 0] = np.arange(count, count + fillers)
        listed[len(tiles) : used, 2] = 1
        return bucket, numbers, len(tiles)
    return None


@functools.lru_cache
def _rooms(tile: int, most: int) -> tuple[tuple[Bucket, ...], np.ndarray]:
    """The buckets, and what the compiled module is told of them."""
    buckets = tuple(Bucket(tokens, tile) for tokens in rungs(1, most))
    rooms = [(b.tokens, b.sequences, b.tiles, b.count_at, b.size) for b in buckets]
    return buckets, np.array(rooms, dtype=np.int64).reshape(-1, 5)
