"""Texts, and pairs of texts, to labels; pairs also to a number."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ....commands.errors import UserError
from ...records import listed
from .. import metrics
from ..features import Features
from ..tables import Role
from .base import Task, in_order, label_of, per_row, probabilities, text_of

LABELS = ("label", "labels", "class", "category", "sentiment", "target", "intent", "gold_label")
FIRST = ("sentence1", "text1", "premise", "question1", "text_a", "sentence_a", "query", "question")
SECOND = ("sentence2", "text2", "hypothesis", "question2", "text_b", "sentence_b")


class Example(NamedTuple):
    first: str
    second: str | None = None
    label: str | None = None


class Classify(Task):
    """Texts to one of some labels."""

    name = "classify"
    auto, adapted = "AutoModelForSequenceClassification", "SEQ_CLS"
    roles = {
        "text": Role(("text", "sentence", "review", "content", "comment", "document", "question")),
        "label": Role((*LABELS, "stars", "topic"), (True, False)),
    }

    @property
    def figures_known(self) -> tuple[str, ...]:
        both = ("f1_macro", "accuracy", "precision_macro", "recall_macro", "roc_auc")
        return (*both, "f1", "precision", "recall") if len(self.labels) == 2 else both

    def parse(self, cells: dict[str, Any]) -> Example:
        return Example(text_of(cells, "text"), None, label_of(cells))

    def learn(self, examples: Sequence[Example]) -> None:
        self.labels = in_order(one.label for one in examples if one.label is not None)
        if len(self.labels) < 2:
            raise UserError(f"all rows have the label {self.labels[0]!r}: there is nothing to tell")
        if len(self.labels) > 1000 or len(self.labels) * 2 > len(examples) > 20:
            raise UserError(
                f"there are {len(self.labels)} labels in {len(examples)} rows, such as "
                f"{self.labels[0][:40]!r}: say by --label which column has labels"
            )

    def check(self, example: Example) -> None:
        if example.label not in self.labels:
            raise ValueError(
                f"the label is {example.label!r}, and training has {listed(self.labels)}"
            )

    def stratum(self, example: Example) -> Any:
        return example.label

    def counts(self, examples: Iterable[Example]) -> list[int]:
        found = Counter(one.label for one in examples)
        return [found[label] for label in self.labels]

    def features(
        self,
        tokenizer: Any,
        examples: Sequence[Example],
        labelled: bool,
        learning: bool = False,
    ) -> Features:
        encoded = self._encoded(tokenizer, examples)
        found = Features()
        long = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) > self.length]
        found.truncated = len(long)
        if long:
            limits = {"truncation": True, "max_length": self.length}
            short = self._encoded(tokenizer, [examples[row] for row in long], **limits)
            for name in encoded:
                for place, row in enumerate(long):
                    encoded[name][row] = short[name][place]
        number = {label: number for number, label in enumerate(self.labels)}
        for row, example in enumerate(examples):
            inputs: dict[str, Any] = {name: encoded[name][row] for name in encoded}
            if labelled:
                inputs["labels"] = self.target(example, number)
            found.add(row, inputs)
        return found

    def _encoded(
        self, tokenizer: Any, examples: Sequence[Example], **limits: Any
    ) -> dict[str, list[list[int]]]:
        texts = [[one.first for one in examples]]
        if examples[0].second is not None:
            texts.append([str(one.second) for one in examples])
        encoded = tokenizer(*texts, return_attention_mask=False, verbose=False, **limits)
        return {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}

    def target(self, example: Example, number: dict[str, int]) -> Any:
        assert example.label is not None
        return number[example.label]

    def figures(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> dict[str, float]:
        gold = np.array([self.labels.index(str(one.label)) for one in examples])
        found = probabilities(per_row(features, outputs, len(examples)))
        return metrics.of_classes(gold, found)

    def tables(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> dict[str, Any]:
        gold = [str(one.label) for one in examples]
        best = per_row(features, outputs, len(examples)).argmax(-1)
        return metrics.of_each_class(gold, [self.labels[place] for place in best], self.labels)

    def predictions(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> list[dict[str, Any]]:
        found = probabilities(per_row(features, outputs, len(examples)))
        return [
            {
                "label": self.labels[int(row.argmax())],
                "score": float(row.max()),
                "scores": dict(zip(self.labels, row.tolist(), strict=True)),
            }
            for row in found
        ]


class Pair(Classify):
    """Pairs to one of some labels, or to a number (`scored`)."""

    name = "pair"
    roles = {
        "text": Role(FIRST),
        "second": Role((*SECOND, "passage", "answer", "sentence", "document")),
        "label": Role((*LABELS, "score", "similarity", "similarity_score"), (True, False)),
    }

    def __init__(self, length: int, stride: int | None = None, scored: bool | None = None) -> None:
        super().__init__(length, stride)
        self.scored = scored

    @property
    def figures_known(self) -> tuple[str, ...]:
        return ("spearman", "pearson") if self.scored else super().figures_known

    def parse(self, cells: dict[str, Any]) -> Example:
        value = cells.get("label")
        if isinstance(value, float) and not value.is_integer():
            cells = {**cells, "label": repr(value)}
        example = Example(text_of(cells, "text"), text_of(cells, "second"), label_of(cells))
        if self.scored and example.label is not None:
            _number(example.label)
        return example

    def learn(self, examples: Sequence[Example]) -> None:
        labels = [str(one.label) for one in examples]
        if self.scored is None:
            # Whole numbers may be classes; numbers with a point can't.
            self.scored = all(map(_is_number, labels)) and any("." in label for label in labels)
        if not self.scored:
            super().learn(examples)
            return
        for label in labels:
            _number(label)
        if len(set(labels)) == 1:
            raise UserError(f"all rows have the score {labels[0]}: there is nothing to tell")
        self.labels = ["score"]

    def check(self, example: Example) -> None:
        if self.scored:
            _number(str(example.label))
        else:
            super().check(example)

    def stratum(self, example: Example) -> Any:
        return None if self.scored else example.label

    def counts(self, examples: Iterable[Example]) -> list[int]:
        if self.scored:
            raise UserError("--class-weights is for labels, and these are scores")
        return super().counts(examples)

    def state(self) -> dict[str, Any]:
        return {"scored": self.scored}

    def restore(self, labels: list[str], state: dict[str, Any]) -> None:
        super().restore(labels, state)
        self.scored = state["scored"]

    def of_model(self) -> dict[str, Any]:
        kind = "regression" if self.scored else "single_label_classification"
        return {**super().of_model(), "problem_type": kind}

    def target(self, example: Example, number: dict[str, int]) -> Any:
        return float(str(example.label)) if self.scored else super().target(example, number)

    def figures(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> dict[str, float]:
        if not self.scored:
            return super().figures(features, examples, outputs)
        gold = np.array([float(str(one.label)) for one in examples])
        return metrics.of_scores(gold, per_row(features, outputs, len(examples))[:, 0])

    def tables(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> dict[str, Any]:
        return {} if self.scored else super().tables(features, examples, outputs)

    def predictions(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> list[dict[str, Any]]:
        if not self.scored:
            return super().predictions(features, examples, outputs)
        found = per_row(features, outputs, len(examples))[:, 0]
        return [{"score": float(value)} for value in found]


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _number(label: str) -> None:
    if not _is_number(label):
        raise ValueError(f"the score must be a finite number, got {label!r}")
