"""A task, as all have it: its columns, its labels, the inputs of a row, figures and predictions."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from ....commands.errors import UserError
from ...records import string
from ..features import Features
from ..tables import Role


class Task:
    """A task. `learn` sets its labels; a saved model brings them along."""

    name: ClassVar[str]
    auto: ClassVar[str]  # transformers' class
    adapted: ClassVar[str]  # peft's name of it
    roles: ClassVar[dict[str, Role]]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)

    def __init__(self, length: int, stride: int | None = None) -> None:
        self.length, self.stride = length, stride
        self.labels: list[str] = []

    @property
    def figures_known(self) -> tuple[str, ...]:
        """Those that may be asked for as the better one; the first is by default."""
        raise NotImplementedError

    def parse(self, cells: dict[str, Any]) -> Any:
        """An example of a row's cells by their roles. Raises ValueError for a wrong one."""
        raise NotImplementedError

    def learn(self, examples: Sequence[Any]) -> None:
        """Labels, and whatever else the training rows say."""

    def check(self, example: Any) -> None:
        """Raises ValueError for a labelled row that doesn't fit what was learnt."""

    def stratum(self, example: Any) -> Any:
        """Rows with the same one are spread over training and the held-out part; None: any."""
        return None

    def group(self, example: Any) -> Any:
        """Rows with the same one stay on one side; None: each by itself."""
        return None

    def counts(self, examples: Iterable[Any]) -> list[int]:
        """Of each label in the training rows."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """All that was learnt besides labels, for a saved model."""
        return {}

    def restore(self, labels: list[str], state: dict[str, Any]) -> None:
        self.labels = labels

    def of_model(self) -> dict[str, Any]:
        """Entries of the model's configuration."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
        }

    def features(
        self, tokenizer: Any, examples: Sequence[Any], labelled: bool, learning: bool = False
    ) -> Features:
        """labelled: with what the loss is made of; learning: without what teaches nothing."""
        raise NotImplementedError

    def windows(self, tokenizer: Any, *texts: Any, **more: Any) -> Any:
        """A text's windows, with the places of their tokens. Without `stride` the first counts."""
        if not tokenizer.is_fast:
            raise UserError(
                f"--task {self.name} needs a fast tokenizer, which knows where a token is from"
            )
        return tokenizer(
            *texts,
            **more,
            max_length=self.length,
            stride=self.stride or 0,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )

    def figures(
        self, features: Features, examples: Sequence[Any], outputs: Any
    ) -> dict[str, float]:
        raise NotImplementedError

    def tables(self, features: Features, examples: Sequence[Any], outputs: Any) -> dict[str, Any]:
        """More than a number each: a confusion matrix, figures of each label."""
        return {}

    def predictions(
        self, features: Features, examples: Sequence[Any], outputs: Any
    ) -> list[dict[str, Any]]:
        """Of each row, as it is written."""
        raise NotImplementedError


def text_of(cells: dict[str, Any], role: str) -> str:
    text = string(cells.get(role), role)
    if not text or text.isspace():
        raise ValueError(f"the {role} is empty")
    return text


def label_of(cells: dict[str, Any], role: str = "label") -> str | None:
    """A class by its name, whatever type the file has for it; None where there is no column."""
    if role not in cells:
        return None
    value = cells[role]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with a gap comes as floats
    if isinstance(value, bool) or isinstance(value, int):
        value = str(value)
    label = string(value, role).strip()
    if not label:
        raise ValueError(f"the {role} is empty")
    return label


def in_order(labels: Iterable[str]) -> list[str]:
    """Numbers by their size, names by the alphabet."""
    found = set(labels)
    if all(re.fullmatch(r"-?\d+", label) for label in found):
        return sorted(found, key=lambda label: (int(label), label))
    return sorted(found)


def probabilities(logits: Any) -> np.ndarray:
    from scipy.special import softmax

    return softmax(np.asarray(logits, np.float64), axis=-1)


def per_row(features: Features, values: Any, rows: int) -> np.ndarray:
    """In the rows' order, where each has one input."""
    values = np.asarray(values)
    found = np.empty((rows, *values.shape[1:]), values.dtype)
    found[features.rows] = values
    return found
