"""Tokens that are to be predicted: drawn anew each time a sequence is read."""

from dataclasses import dataclass

import numpy as np

from .draws import Draws
from .examples import spans


@dataclass(frozen=True)
class Masking:
    """Of a sequence's n tokens of text round(share * n) are predicted, at least one. Of these the
    shares `replaced` become [MASK] and a random token; the rest stays as it is.

    By whole words, the last word drawn may be longer than what is left to draw. It is taken with
    such a probability that the expected number of tokens stays the same.
    """

    share: float
    replaced: tuple[float, float]
    mask: int
    ordinary: np.ndarray  # int64: the tokens that a random one is drawn of
    continues: (
        np.ndarray | None
    )  # bool (vocabulary,): tokens that go on with a word; None: each by itself

    def __call__(
        self, ids: np.ndarray, text: np.ndarray, counts: np.ndarray, draws: Draws
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replaces in ids, and gives the places of what is to be predicted, ascending, and what
        stood there. text: places of the tokens of text, ascending; counts: of each sequence's."""
        wanted = np.maximum(np.floor(self.share * counts + 0.5).astype(np.int64), 1)
        if self.continues is None:
            order = _shuffled(counts, draws)
            chosen = order[spans(np.cumsum(counts) - counts, wanted)]
        else:
            chosen = self._words(ids[text], text, counts, wanted, draws)
        places = np.sort(text[chosen])
        labels = ids[places]
        how = draws.uniform(len(places))
        masked = how < self.replaced[0]
        random = ~masked & (how < self.replaced[0] + self.replaced[1])
        ids[places[masked]] = self.mask
        bounds = np.full(int(random.sum()), len(self.ordinary))
        ids[places[random]] = self.ordinary[draws.below(bounds)]
        return places, labels

    def _words(
        self,
        tokens: np.ndarray,
        text: np.ndarray,
        counts: np.ndarray,
        wanted: np.ndarray,
        draws: Draws,
    ) -> np.ndarray:
        assert self.continues is not None
        begins = ~self.continues[tokens]
        begins[0] = True
        begins[1:] |= np.diff(text) != 1  # a segment that was cut may start within a word
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=len(text))
        words = np.add.reduceat(begins.astype(np.int64), np.cumsum(counts) - counts)
        order = _shuffled(words, draws)
        ends = np.cumsum(lengths[order])
        before = ends - lengths[order] - np.repeat(np.cumsum(counts) - counts, words)
        left = np.repeat(wanted, words) - before
        taken = left > draws.uniform(len(order)) * lengths[order]
        taken[np.cumsum(words) - words] = True
        chosen = order[taken]
        return spans(starts[chosen], lengths[chosen])


def _shuffled(counts: np.ndarray, draws: Draws) -> np.ndarray:
    """0, 1, 2, ..., of which each run of `counts` is shuffled in itself."""
    total = int(counts.sum())
    # Sequence, random bits and place in one number: sorting is faster than asking for an order.
    low = total.bit_length()
    high = 64 - len(counts).bit_length()
    keys = draws.raw(total) >> np.uint64(64 - high + low) << np.uint64(low)
    keys |= np.arange(total, dtype=np.uint64)
    keys |= np.repeat(np.arange(len(counts), dtype=np.uint64) << np.uint64(high), counts)
    keys.sort()
    return (keys & np.uint64((1 << low) - 1)).astype(np.int64)
