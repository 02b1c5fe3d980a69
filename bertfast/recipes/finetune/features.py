"""Inputs of the model as a dataset, and the batches of it that training takes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

GROUP = 50  # batches whose texts are sorted by length together


@dataclass
class Features(torch.utils.data.Dataset):
    """Inputs, of which a row may have several (windows) or none."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # each input's row
    places: list[Any] = field(default_factory=list)  # where each token comes from: a task's affair
    truncated: int = 0  # rows whose ends the model doesn't see
    left_out: int = 0  # rows of which it sees nothing that it could learn from

    def add(self, row: int, features: dict[str, Any], place: Any = None) -> None:
        self.inputs.append(features)
        self.rows.append(row)
        self.places.append(place)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.inputs[number]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(one["input_ids"]) for one in self.inputs])

    def by_length(self) -> "Features":
        """Longest first, so that a batch has little padding, and the largest comes first."""
        order = np.argsort(-self.lengths, kind="stable")
        inputs, rows, places = (
            [some[place] for place in order] for some in (self.inputs, self.rows, self.places)
        )
        return Features(inputs, rows, places, self.truncated, self.left_out)


class Batches(torch.utils.data.Sampler[list[int]]):
    """Batches of like lengths, of some texts or of some tokens, padding counted. What an epoch has
    follows from the seed and its number alone, and all epochs have as many batches."""

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        texts: int,
        tokens: int | None,
        seed: int,
        epochs: int,
    ) -> None:
        self.lengths, self.texts, self.tokens, self.seed = lengths, texts, tokens, seed
        self.epoch = 0
        if tokens is None:
            self.count = -(-len(lengths) // texts)
        else:
            self.count = max(len(self._cut(epoch)) for epoch in range(epochs))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._cut(self.epoch)
        while len(batches) < self.count:  # the largest in two, or where all are of one text, again
            largest = max(range(len(batches)), key=lambda place: len(batches[place]))
            whole = batches[largest]
            middle = (len(whole) + 1) // 2
            batches[largest] = whole[:middle]
            batches.append(whole[middle:] or whole)
        order = np.random.default_rng((self.seed, self.epoch, 1)).permutation(len(batches))
        return iter([batches[place] for place in order])

    def _cut(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        texts = self.texts if self.tokens is None else self._like_a_batch()
        group = GROUP * texts
        batches: list[list[int]] = []
        for start in range(0, len(order), group):
            some = order[start : start + group]
            some = some[np.argsort(-self.lengths[some], kind="stable")]
            batches += self._of(some)
        return batches

    def _like_a_batch(self) -> int:
        assert self.tokens is not None
        return max(1, int(self.tokens / self.lengths.mean()))

    def _of(self, some: np.ndarray) -> list[list[int]]:
        """Of texts, longest first."""
        if self.tokens is None:
            return [some[at : at + self.texts].tolist() for at in range(0, len(some), self.texts)]
        found: list[list[int]] = []
        at = 0
        while at < len(some):
            count = max(1, self.tokens // int(self.lengths[some[at]]))
            found.append(some[at : at + count].tolist())
            at += count
        return found
