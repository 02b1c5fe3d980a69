"""Packed batches, as a pure function of (folder, options, number): an exact resume saves no state.

Micro-batches are numbered 0, 1, 2, ... over all epochs. An epoch shuffles the blocks of text; a
window is some of them, read into memory, whose sequences are made (examples.py), shuffled and
packed in that order: a micro-batch ends where the next sequence would go over the budget. The last
one of a window takes what is left, so that no window depends on those before it; it is one of
hundreds. Masks are drawn for each micro-batch by its number. With several processes each builds its
own micro-batches and plans all.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ... import checks
from .draws import MASKS, ORDER, SEQUENCES, Draws
from .examples import Examples, Window, pairs, spans, stretches
from .masking import Masking
from .packed import PackedBatch
from .shards import SPLITS, Shards, Split

WINDOW = 2**22  # tokens of text read at once
FULL = 64  # a window has at least as many micro-batches, so that the last one counts for little


@dataclass(frozen=True)
class DataOptions:
    """The batches of pre-training. These and the prepared folder decide every batch.

    tokens: the most in a micro-batch, special tokens included.
    length: the longest sequence, special tokens included.
    nsp: pairs of segments, to predict whether the second follows the first.
    short: with nsp, the share of sequences that are to have a random, smaller length.
    masked_share: of a sequence's tokens of text, those that are predicted.
    replaced: of these, the shares that become [MASK] and a random token; the rest stays.
    whole_words: words are predicted as a whole, however many tokens they have.
    seed: of the order, the pairs and the masks.
    """

    tokens: int = 8192
    length: int = 512
    nsp: bool = True
    masked_share: float = 0.15
    replaced: tuple[float, float] = (0.8, 0.1)
    whole_words: bool = False
    seed: int = 0
    short: float = 0.1

    def __post_init__(self) -> None:
        least = 7 if self.nsp else 3
        checks.check_int("length", self.length, least, 2**20)
        checks.check_int("tokens", self.tokens, 1, 2**24)
        if self.tokens < self.length:
            raise ValueError(
                f"tokens must be length or more, so that a sequence fits a micro-batch, got tokens "
                f"{self.tokens} and length {self.length}"
            )
        checks.check_int("seed", self.seed, 0, 2**63 - 1)
        for name in ("nsp", "whole_words"):
            checks.check_bool(name, getattr(self, name))
        checks.check_number("short", self.short, 0, 1)
        checks.check_number("masked_share", self.masked_share, 0, 1)
        if not 0 < self.masked_share < 1:
            raise ValueError(f"masked_share must be between 0 and 1, got {self.masked_share}")
        if not isinstance(self.replaced, (tuple, list)) or len(self.replaced) != 2:
            raise TypeError(
                "replaced must be two shares, of tokens that become [MASK] and of those that "
                f"become a random token, got {checks.said(self.replaced)}"
            )
        object.__setattr__(self, "replaced", tuple(self.replaced))
        for share in self.replaced:
            checks.check_number("replaced", share, 0, 1)
        if sum(self.replaced) > 1 + 1e-9:
            raise ValueError(f"replaced must sum to 1 or less, got {self.replaced}")

    @property
    def special(self) -> int:
        """Special tokens of a sequence."""
        return 3 if self.nsp else 2


class Place(NamedTuple):
    """A place to go on from. `number` counts micro-batches from the beginning; the others say where
    that is: `batch` is counted from the start of the window, and may reach beyond its end."""

    epoch: int = 0
    window: int = 0
    batch: int = 0
    number: int = 0


class Plan(NamedTuple):
    """A window's micro-batches."""

    tokens: np.ndarray  # the window's text
    examples: Examples  # in their order
    bounds: list[int]  # where each micro-batch starts in them, and the end

    def __len__(self) -> int:
        return len(self.bounds) - 1


class Batches:
    """The micro-batches of one process.

    From the start on, they are dealt out in rounds of `world`: one to rank 0, one to rank 1, and so
    on. Beside each comes the place after its whole round, the same on all ranks, where a later run
    with any number of processes goes on.

    "train" has no end; "held-out" is one pass with the same masks each time, whose last round may
    leave out the last ranks (`count` says how many micro-batches there are).
    """

    def __init__(
        self,
        folder: str | Path,
        options: DataOptions,
        *,
        split: str = "train",
        start: Place | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        checks.check_choice("split", split, SPLITS)
        checks.check_int("world", world, 1)
        checks.check_int("rank", rank, 0, world - 1)
        self.folder, self.options = Path(folder), options
        self.split, self.rank, self.world = split, rank, world
        self.start = Place() if start is None else Place(*start)
        for name, value in self.start._asdict().items():
            checks.check_int(f"start.{name}", value, 0)
        self.shards = Shards(folder)
        self.text = self.shards.split(split)
        self._check_documents()
        self._masking = _masking(self.shards, options)
        size = max(WINDOW, FULL * options.tokens) // self.shards.block
        self.windows = -(-self.text.blocks // size)  # of an epoch
        if self.start.window >= self.windows:
            raise ValueError(
                f"start must be a place in this text, whose epochs have {self.windows} windows, "
                f"got {self.start}"
            )

    @property
    def identity(self) -> str:
        """Equal where the global sequence of micro-batches is equal."""
        told = [self.shards.checksum, asdict(self.options), self.split, WINDOW, FULL]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def count(self, epoch: int = 0) -> int:
        """The micro-batches of an epoch, of all ranks. It plans them all."""
        return sum(len(self._plan(epoch, window)) for window in range(self.windows))

    def _check_documents(self) -> None:
        least = 2 if self.options.nsp else 1
        if self.text.documents < least:
            why = ", as pairs (nsp) take text from another document" if self.options.nsp else ""
            advice = (
                "prepare the text with a larger held_out"
                if self.split == "held-out"
                else "a document ends at an empty line or with its file"
            )
            raise ValueError(
                f"{self.folder} must have {least} or more documents in its split {self.split!r}"
                f"{why}, got {self.text.documents}; {advice}"
            )

    def __iter__(self) -> Iterator[tuple[Place, PackedBatch]]:
        epoch, window, batch, number = self.start
        while self.split == "train" or epoch == 0:
            plan = self._plan(epoch, window)
            for index in range(batch, len(plan)):
                if (number - self.start.number) % self.world == self.rank:
                    # The round may end in the next window.
                    rest = self.world - self.rank
                    place = Place(epoch, window, index + rest, number + rest)
                    yield place, self._batch(plan, epoch, index, number)
                number += 1
            batch = max(batch - len(plan), 0)
            window += 1
            if window == self.windows:
                epoch, window = epoch + 1, 0

    def _plan(self, epoch: int, number: int) -> Plan:
        options = self.options
        salt = SPLITS.index(self.split) << 8
        order = Draws(options.seed, salt + ORDER, epoch, 0).permutation(self.text.blocks)
        size, more = divmod(len(order), self.windows)
        first = number * size + min(number, more)
        chosen = np.sort(order[first : first + size + (number < more)])
        window = read(self.text, chosen, options.nsp)
        room = options.length - options.special
        draws = Draws(options.seed, salt + SEQUENCES, epoch, number)
        if options.nsp:
            examples = pairs(window, room, options.short, draws)
        else:
            examples = stretches(window, room)
        examples = examples.at(draws.permutation(len(examples.first)))
        lengths = examples.first_length + examples.second_length + options.special
        return Plan(window.tokens, examples, packed(lengths, options.tokens))

    def _batch(self, plan: Plan, epoch: int, index: int, number: int) -> PackedBatch:
        options = self.options
        these = plan.examples.at(slice(plan.bounds[index], plan.bounds[index + 1]))
        a, b = these.first_length, these.second_length
        lengths = a + b + options.special
        ends = np.cumsum(lengths)
        begins = ends - lengths
        ids = np.empty(int(ends[-1]), np.int64)
        if options.nsp:
            # Segments in the order of the tokens: A, B, A, B, ...
            sources = np.stack([these.first, these.second], 1).ravel()
            segments = np.stack([a, b], 1).ravel()
            targets = np.stack([begins + 1, begins + a + 2], 1).ravel()
            types = np.repeat(
                np.tile(np.array([0, 1]), len(a)), np.stack([a + 2, b + 1], 1).ravel()
            )
            ids[begins + a + 1] = self.shards.special["sep"]
        else:
            sources, segments, targets = these.first, a, begins + 1
            types = np.zeros(len(ids), np.int64)
        text = spans(targets, segments)
        ids[begins] = self.shards.special["cls"]
        ids[ends - 1] = self.shards.special["sep"]
        ids[text] = plan.tokens[spans(sources, segments)]
        salt = SPLITS.index(self.split) << 8
        places, labels = self._masking(
            ids, text, a + b, Draws(options.seed, salt + MASKS, epoch, number)
        )
        return PackedBatch(
            input_ids=torch.from_numpy(ids),
            token_type_ids=torch.from_numpy(types),
            position_ids=torch.from_numpy(spans(np.zeros_like(lengths), lengths)),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            max_seqlen=int(lengths.max()),
            places=torch.from_numpy(places),
            labels=torch.from_numpy(labels),
            not_next=torch.from_numpy(these.not_next) if options.nsp else None,
        )


def read(text: Split, blocks: np.ndarray, two: bool) -> Window:
    """A window of some blocks, ascending. two: with a piece of a second document at least, if need
    be of the next block that has one, as a guest."""
    guests: list[int] = []
    if two:
        first, last = text.document_span(int(blocks[0]))[0], text.document_span(int(blocks[-1]))[1]
        if first == last:
            others = ((int(blocks[-1]) + step) % text.blocks for step in range(text.blocks))
            with_more = (n for n in others if text.document_span(n) != (first, first))
            guests = list(itertools.islice(with_more, 1))
    tokens, sentences, pieces, documents = [], [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], []
    for number in [*map(int, blocks), *guests]:
        text_of_block, bounds, starts, document = text.read(number)
        tokens.append(text_of_block)
        sentences.append(bounds[1:] + sentences[-1][-1])
        pieces.append(starts[1:] + pieces[-1][-1])
        documents.append(document + np.arange(len(starts) - 1))
    count = len(documents[-1]) if guests else 0
    names = np.concatenate(documents)
    if guests:
        names = (names != names[0]).astype(np.int64)
    return Window(
        np.concatenate(tokens), np.concatenate(sentences), np.concatenate(pieces), names, count
    )


def packed(lengths: np.ndarray, budget: int) -> list[int]:
    """The first sequence of each micro-batch, and the end."""
    ends = np.cumsum(lengths)
    bounds = [0]
    while bounds[-1] < len(ends):
        before = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, before + budget, "right")))
    return bounds


def _masking(shards: Shards, options: DataOptions) -> Masking:
    continues = shards.continues() if options.whole_words else None
    if options.whole_words and continues is None:
        raise ValueError(
            f"whole_words must be False for the tokenizer of {shards.folder}: only WordPiece's "
            "says which tokens go on with a word"
        )
    ordinary = np.setdiff1d(np.arange(shards.vocabulary), shards.reserved)
    return Masking(
        options.masked_share, options.replaced, shards.special["mask"], ordinary, continues
    )
