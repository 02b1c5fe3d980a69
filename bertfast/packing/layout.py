"""lay_out: cu_seqlens and the plan of lengths that the host knows.

All numbers are made by numpy in one buffer, which reaches the device in one copy; `plan` would
launch some fifty small kernels there.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .. import checks
from .compiled import module
from .tiles import Plan, tile_size


def lay_out(
    lengths: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, Plan]:
    """cu_seqlens, int32 (sequences + 1,), and the plan of a batch of sequences of these lengths,
    both on `device`. Raises ValueError if they have more than 2**31 - 1 tokens together."""
    lengths = checks.check_ints("lengths", lengths, 0)
    device = checks.check_device("device", device)
    if (total := sum(lengths)) > checks.INT32_MAX:
        raise ValueError(f"lengths must add up to 2**31 - 1 or less, got {total}")
    return lay_out_array(np.array(lengths, dtype=np.int64), device)


def lay_out_array(lengths: np.ndarray, device: torch.device) -> tuple[torch.Tensor, Plan]:
    """lay_out for lengths, int64, that are known to be right."""
    batch = lengths.size
    bounds = np.zeros(batch + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    total, longest = int(bounds[-1]), int(lengths.max(initial=0))
    tile = tile_size(batch, longest, total)
    tiles = tiles_of(bounds, tile)

    # All in one tensor, each part where 16 bytes begin, as numpy's memory does.
    at = -(-bounds.size // 4) * 4
    numbers = np.zeros(at + 4 + tiles.size, dtype=np.int32)
    numbers[: batch + 1] = bounds
    numbers[at] = len(tiles)
    numbers[at + 4 :].reshape(-1, 3)[:] = tiles
    everything = torch.from_numpy(numbers).to(device, non_blocking=True)
    cu_seqlens, count = everything[: batch + 1], everything[at : at + 1]
    known = cu_seqlens.clone() if everything.device.type == "cpu" else None
    return cu_seqlens, Plan(
        everything[at + 4 :].view(-1, 3), count, tile, batch, longest, total, known
    )


def tiles_of(bounds: np.ndarray, tile: int) -> np.ndarray:
    """(tiles, 3): sequence, first position in it, number of sequences. bounds: int64."""
    compiled = module()
    if compiled is not None:
        return compiled.tiles(bounds, tile)

    # 1. Were a group to start at sequence i, it would end before sequence `after[i]`.
    batch = bounds.size - 1
    after = np.searchsorted(bounds, bounds[:-1] + tile, side="right") - 1
    after = np.maximum(after, np.arange(1, batch + 1))

    # 2. The sequences that start a group: those that are reached from 0 by steps of `after`.
    next_start, start, reached = after.tolist(), 0, []
    while start < batch:
        reached.append(start)
        start = next_start[start]
    starts = np.array(reached, dtype=np.int64)

    # 3. The tiles of each group.
    after = after[starts]
    counts = -((bounds[starts] - bounds[after]) // tile)
    before = counts.cumsum() - counts  # the number of the group's first tile
    tiles = np.empty((int(counts.sum()), 3), dtype=np.int64)
    tiles[:, 0] = np.repeat(starts, counts)
    tiles[:, 1] = (np.arange(len(tiles)) - np.repeat(before, counts)) * tile
    tiles[:, 2] = np.repeat(after - starts, counts)
    return tiles
