"""Token counts as real batches have them: seeded, synthetic, with a stated mean.

Every mix is a log-normal distribution cut off at `longest`, which is what a tokenizer with
truncation does to documents: those that are longer pile up there. The distribution's middle is
solved for, so that the mean after the cut is the stated one. They stand for

    queries    what people type into a search box
    passages   paragraphs that a search engine indexes
    squad      question and paragraph of extractive question answering
    wikipedia  whole articles cut at 512: half of such a batch is padding
    full       no padding at all: nothing can be saved
"""

import functools
import math
import statistics
from dataclasses import dataclass

import torch

_QUANTILES = 4096  # the distribution is kept as this many equally likely lengths


@dataclass(frozen=True)
class Mix:
    name: str
    mean: float
    longest: int
    spread: float  # standard deviation of the logarithm
    shortest: int = 4

    def lengths(self, count: int, seed: int = 0) -> list[int]:
        """`count` lengths drawn from the distribution; the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(_QUANTILES, (count,), generator=generator)
        table = _table(self)
        return [table[i] for i in drawn.tolist()]


MIXES = {
    mix.name: mix
    for mix in (
        Mix("queries", mean=20, longest=128, spread=0.6),
        Mix("passages", mean=80, longest=256, spread=0.5),
        Mix("squad", mean=176, longest=384, spread=0.4, shortest=24),
        Mix("wikipedia", mean=256, longest=512, spread=1.1, shortest=8),
        Mix("full", mean=128, longest=128, spread=0.0),
    )
}


@functools.lru_cache(None)
def _table(mix: Mix) -> tuple[int, ...]:
    """Equally likely lengths whose mean is the mix's, found by halving the range of its middle."""
    if mix.spread == 0:
        return (mix.longest,) * _QUANTILES
    normal = statistics.NormalDist()
    factors = [
        math.exp(mix.spread * normal.inv_cdf((i + 0.5) / _QUANTILES)) for i in range(_QUANTILES)
    ]

    def cut(middle: float) -> list[int]:
        return [min(mix.longest, max(mix.shortest, round(middle * f))) for f in factors]

    low, high = 1.0, 64.0 * mix.longest
    for _ in range(60):
        middle = (low + high) / 2
        if statistics.fmean(cut(middle)) < mix.mean:
            low = middle
        else:
            high = middle
    return tuple(cut(high))
