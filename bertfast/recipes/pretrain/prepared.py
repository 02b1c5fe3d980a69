"""Prepared text: made, and as training and evaluation use it, with its errors as the user's."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ...commands.errors import UserError
from .batches import Batches, DataOptions, Place
from .options import PrepareOptions
from .parallel import Processes
from .prepare import prepare as prepare_text
from .shards import SPLITS, Shards

T = TypeVar("T")
# Blocks of text, some 32k tokens each, of which tokens are counted at most.
COUNTED_BLOCKS = 1024


class Prepared(NamedTuple):
    shards: Shards

    @classmethod
    def open(cls, folder: Path) -> "Prepared":
        return cls(_told(lambda: Shards(folder)))

    @property
    def folder(self) -> Path:
        return self.shards.folder

    @property
    def vocabulary(self) -> int:
        return self.shards.vocabulary

    @property
    def pad(self) -> int:
        return self.shards.special["pad"]

    @property
    def fingerprint(self) -> str:
        return self.shards.checksum

    def holds_out(self, nsp: bool) -> bool:
        """True if there are documents to evaluate on."""
        return self.shards.split("held-out").documents > int(nsp)

    def batches(
        self,
        options: DataOptions,
        split: str = "train",
        start: Place | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Batches:
        made = functools.partial(Batches, self.folder, options, split=split, start=start)
        return _told(lambda: made(rank=rank, world=world))

    def counts(self) -> np.ndarray:
        """How often each token comes in the text of training, or in blocks of it that lie evenly
        spread: int64 (vocabulary,)."""
        return _counts(self.shards)


@functools.lru_cache(1)
def _counts(shards: Shards) -> np.ndarray:
    """Once for all evaluations of a run."""
    text = shards.split("train")
    number = min(text.blocks, COUNTED_BLOCKS)
    counts = np.zeros(shards.vocabulary, np.int64)
    for block in np.linspace(0, text.blocks - 1, number).astype(np.int64):
        counts += np.bincount(text.read(int(block))[0], minlength=shards.vocabulary)
    return counts


def prepare(options: PrepareOptions, processes: Processes) -> int:
    """The `prepare` command: the first process works."""

    def make() -> str:
        made = _told(
            lambda: prepare_text(
                *(list(options.texts), options.data),
                tokenizer=options.tokenizer,
                vocabulary=options.vocabulary,
                lowercase=options.lowercase,
                column=options.column,
                whole_files=options.whole_files,
                held_out=options.held_out,
                seed=options.seed,
                overwrite=options.overwrite,
                progress=sys.stderr.isatty(),
            )
        )
        told = [f"{made.vocabulary:,} tokens in the vocabulary"]
        for name in SPLITS:
            text = made.split(name)
            told.append(f"{name}: {text.documents:,} documents, {text.tokens:,} tokens")
        return "; ".join(told)

    said = processes.by_first(make)
    if processes.first:
        print(f"{options.data}: {said}")
    return 0


def data_options(**given: Any) -> DataOptions:
    return _told(lambda: DataOptions(**given))


def _told(make: Callable[[], T]) -> T:
    """The result of `make`; its error as a line for the user."""
    try:
        return make()
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(str(error)) from error
