"""Sequences of a window of text, by their bounds alone: no token is looked at.

Without pairs a sequence is [CLS] text [SEP]: a document is cut into stretches of what fits.

With pairs it is [CLS] A [SEP] B [SEP], as in BERT of 2018: a document's next sentences are gathered
until they fill the sequence and cut, at a random sentence, into A and B. In half of the pairs B is
then taken from a random place of another document, and the sentences of the true B are gathered
again. Of a pair that is too long the longer side loses tokens at its front and its end. With
probability `short` a sequence is to have a random, smaller length. Five things differ from 2018:

- The label is a fair coin for each pair. There, a last sentence by itself always had a random B;
  here the sentence before it comes once more, so that a document ends with a true pair.
- A random B is about as long as the true one would be. There it filled the sequence, so that the
  two lengths alone told 62 % of labels (of documents of 540 tokens, sequences of 512; here 52 %).
- A sentence of more than half a sequence counts as several, of an eighth each, and the only one of
  a document as two. There, what didn't fit was lost.
- The smaller length is drawn for each sequence and not for each document.
- Another document is one of the same window.

All documents of a window take a step at once, each step one pair of each: so numpy does the work.
"""

from typing import NamedTuple

import numpy as np

from .draws import Draws

ATTEMPTS = 4  # to find another document that is long enough


class Window(NamedTuple):
    """Text of many documents. A piece is a document, or a part of one that is long."""

    tokens: np.ndarray  # uint16 or uint32
    sentences: np.ndarray  # int64 (sentences + 1,): where each starts in tokens, ascending
    pieces: np.ndarray  # int64 (pieces + 1,): where each starts in sentences, ascending
    documents: np.ndarray  # int64 (pieces,): each one's document, ascending
    guests: int = 0  # pieces at the end that serve as another document's text alone


class Examples(NamedTuple):
    """Each sequence's segments: where they start in the window's tokens, and their lengths; all
    int64 (sequences,). not_next is 0 where the second follows the first."""

    first: np.ndarray
    first_length: np.ndarray
    second: np.ndarray
    second_length: np.ndarray
    not_next: np.ndarray

    def at(self, index: np.ndarray | slice) -> "Examples":
        return Examples(*(part[index] for part in self))


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, as many as its length: [5, 0], [3, 2] -> 5 6 7 0 1."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def stretches(window: Window, room: int) -> Examples:
    """Without pairs: each piece in as few stretches as it takes, all full but the last."""
    bounds = window.sentences[window.pieces]
    starts, ends = bounds[:-1], bounds[1:]
    counts = -(-(ends - starts) // room)
    first = np.repeat(starts, counts) + room * spans(np.zeros_like(counts), counts)
    length = np.minimum(np.repeat(ends, counts) - first, room)
    nothing = np.zeros_like(first)
    return Examples(first, length, nothing, nothing, nothing)


class _Text(NamedTuple):
    """A window as `pairs` sees it. Pieces of a piece's own document are those from low to high."""

    bounds: np.ndarray  # of sentences, in tokens
    starts: np.ndarray  # of pieces, in sentences
    ends: np.ndarray
    low: np.ndarray
    high: np.ndarray


def pairs(window: Window, room: int, short: float, draws: Draws) -> Examples:
    """Pairs of segments, `room` tokens at most each. The window has two documents or more."""
    bounds, pieces = _finer(window.sentences, window.pieces, room)
    text = _Text(
        bounds,
        pieces[:-1],
        pieces[1:],
        np.searchsorted(window.documents, window.documents, "left"),
        np.searchsorted(window.documents, window.documents, "right"),
    )
    active = np.arange(len(text.starts) - window.guests)
    position = text.starts.copy()
    made = []
    while len(active):
        count = len(active)
        start, end, i = text.starts[active], text.ends[active], position[active]
        i = i - ((end - i == 1) & (i > start))
        length = np.full(count, room)
        shorter = draws.uniform(count) < short
        length[shorter] = 2 + draws.below(np.full(int(shorter.sum()), room - 1))
        j = np.searchsorted(bounds, bounds[i] + length)
        j = np.minimum(np.maximum(j, i + 2), end)
        cut = i + 1 + draws.below(np.maximum(j - i - 1, 1))
        random = (draws.uniform(count) < 0.5) | (cut == j)
        first, first_end = bounds[i], bounds[cut]
        second, second_end = bounds[np.minimum(cut, j - 1)], bounds[j]
        # A full pair is filled again, and one that its document's end left short stays so.
        full = second_end - first >= length
        wanted = np.maximum(np.where(full, length - first_end + first, second_end - second), 1)
        second[random], second_end[random] = _elsewhere(
            text, active[random], wanted[random], full[random], draws
        )
        made.append((first, first_end, second, second_end, random))
        position[active] = np.where(random, cut, j)
        active = active[position[active] < end]
    first, first_end, second, second_end, random = (
        np.concatenate(part) for part in zip(*made, strict=True)
    )
    return _fit(first, first_end, second, second_end, random.astype(np.int64), room, draws)


def _elsewhere(
    text: _Text, pieces: np.ndarray, wanted: np.ndarray, full: np.ndarray, draws: Draws
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of other documents than those of some pieces, from token to token: for each as many
    as have the tokens that are wanted, or where it isn't to be full as come nearest to that."""
    bounds, starts, ends, low, high = text
    own = (high - low)[pieces]
    other = np.zeros_like(pieces)
    missing = np.ones(len(pieces), bool)
    for _ in range(ATTEMPTS):
        drawn = draws.below(len(starts) - own)
        drawn += np.where(drawn >= low[pieces], own, 0)
        other = np.where(missing, drawn, other)
        missing = bounds[ends[other]] - bounds[starts[other]] < wanted
    latest = np.searchsorted(bounds, bounds[ends[other]] - wanted, "right")
    begin = starts[other] + draws.below(np.maximum(latest - starts[other], 1))
    aim = bounds[begin] + wanted
    stop = np.where(full, np.searchsorted(bounds, aim), _nearest(bounds, aim))
    stop = np.minimum(np.maximum(stop, begin + 1), ends[other])
    return bounds[begin], bounds[stop]


def _nearest(bounds: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Numbers of the bounds that are nearest to some values."""
    above = np.minimum(np.searchsorted(bounds, values), len(bounds) - 1)
    below = np.maximum(above - 1, 0)
    return np.where(values - bounds[below] < bounds[above] - values, below, above)


def _finer(sentences: np.ndarray, pieces: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds with more of them in sentences that are long or alone."""
    lengths = np.diff(sentences)
    # Parts are small, as a pair that is too long by a part of one loses that.
    parts = np.where(lengths > room // 2, -(-lengths // max(room // 8, 1)), 1)
    alone = pieces[:-1][np.diff(pieces) == 1]
    parts[alone] = np.maximum(parts[alone], np.minimum(lengths[alone], 2))
    if (parts == 1).all():
        return sentences, pieces
    number = spans(np.zeros_like(parts), parts)
    inside = np.repeat(lengths, parts) * number // np.repeat(parts, parts)
    bounds = np.append(np.repeat(sentences[:-1], parts) + inside, sentences[-1])
    return bounds, np.concatenate([[0], np.cumsum(parts)])[pieces]


def _fit(
    first: np.ndarray,
    first_end: np.ndarray,
    second: np.ndarray,
    second_end: np.ndarray,
    not_next: np.ndarray,
    room: int,
    draws: Draws,
) -> Examples:
    """Pairs cut to the room: the longer side loses tokens until both are as long, then both do."""
    a, b = first_end - first, second_end - second
    excess = np.maximum(a + b - room, 0)
    uneven = np.minimum(np.abs(a - b), excess)
    rest = excess - uneven
    cut_a = np.where(a > b, uneven, 0) + rest // 2
    cut_b = np.where(a > b, 0, uneven) + (rest - rest // 2)
    return Examples(
        first + draws.below(cut_a + 1),
        a - cut_a,
        second + draws.below(cut_b + 1),
        b - cut_b,
        not_next,
    )
