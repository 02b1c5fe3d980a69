"""Lengths of real batches: how useful packing is depends on them.

    python -m bertfast.bench.length_mixes      the share of useful scores for each

Synthetic, with published means: question answering over paragraphs, pages of an encyclopedia cut at
512 tokens (about half of a padded batch is padding), and search queries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import packing


@dataclass(frozen=True)
class Mix:
    draw: Callable[[int, torch.Generator], torch.Tensor]
    max_seqlen: int


def _lognormal(median: float, sigma: float, least: int, most: int):
    def draw(count: int, generator: torch.Generator) -> torch.Tensor:
        normal = torch.randn(count, generator=generator)
        return (math.log(median) + sigma * normal).exp().clamp(least, most).int()

    return draw


def _pages(count: int, generator: torch.Generator) -> torch.Tensor:
    full = torch.rand(count, generator=generator) < 0.23
    rest = torch.randint(5, 354, (count,), generator=generator)
    return torch.where(full, 512, rest).int()


MIXES = {
    "squad": Mix(_lognormal(165, 0.38, 30, 384), 384),
    "wikipedia": Mix(_pages, 512),
    "queries": Mix(_lognormal(16.5, 0.62, 4, 128), 128),
}


def cu_seqlens(name: str, batch: int, seed: int = 0) -> torch.Tensor:
    """The bounds of a packed batch with this mix of lengths, on the host."""
    lengths = MIXES[name].draw(batch, torch.Generator().manual_seed(seed))
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)


def useful_share(name: str, seed: int = 0, batch: int = 64, step: int = packing.STEP) -> float:
    bounds = cu_seqlens(name, batch, seed)
    plan = packing.plan(bounds, MIXES[name].max_seqlen, int(bounds[-1]))
    return packing.useful_share(bounds, plan, step)


def main() -> None:
    print("share of useful scores, batches of 64      tile   forward, dq   dk and dv on Hopper")
    for name, mix in MIXES.items():
        bounds = cu_seqlens(name, 64)
        total = int(bounds[-1])
        tile = packing.tile_size(64, mix.max_seqlen, total)
        shares = [
            sum(useful_share(name, seed, step=step) for seed in range(20)) / 20
            for step in (32, tile)
        ]
        label = f"{name}, {total / 64:.0f} of {mix.max_seqlen} tokens"
        print(f"{label:44}{tile:3}{shares[0]:13.0%}{shares[1]:17.0%}")


if __name__ == "__main__":
    main()
