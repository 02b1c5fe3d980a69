"""Answers to questions, as spans of a context.

A context longer than the model's limit is cut, or goes through in windows that share some tokens
(`stride`). Where training rows have questions without an answer, the first token stands for none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ....commands.errors import UserError
from ...records import string
from .. import metrics
from ..features import Features
from ..tables import Role
from .base import Task, probabilities, text_of

LONGEST = 30  # tokens of an answer
MOST = 20  # starts and ends that are tried


class Example(NamedTuple):
    question: str
    context: str
    answers: list[tuple[str, int]] | None = None  # and where each begins


class Seen(NamedTuple):
    """The context in a window: its first and last token, and the tokens' places in it."""

    first: int
    last: int
    offsets: list[tuple[int, int]]


class Answers(Task):
    """Questions and contexts to answers."""

    name = "qa"
    auto, adapted = "AutoModelForQuestionAnswering", "QUESTION_ANS"
    label_names = ("start_positions", "end_positions")
    roles = {
        "question": Role(("question", "query")),
        "context": Role(("context", "passage", "paragraph", "text")),
        "answer": Role(("answers", "answer", "answer_text"), (True, False)),
        "start": Role(("answer_start", "start", "answer_begin"), (False, False)),
    }
    figures_known = ("f1", "exact")

    def __init__(self, length: int, stride: int | None = None) -> None:
        super().__init__(length, stride)
        self.may_be_none = False

    def parse(self, cells: dict[str, Any]) -> Example:
        question, context = text_of(cells, "question").strip(), text_of(cells, "context")
        if "answer" not in cells:
            return Example(question, context)
        found = _answers(cells["answer"], cells.get("start"))
        return Example(question, context, [_placed(context, *one) for one in found])

    def learn(self, examples: Sequence[Example]) -> None:
        self.may_be_none = any(not one.answers for one in examples)
        if not any(one.answers for one in examples):
            raise UserError("no row has an answer: there is nothing to learn")

    def group(self, example: Example) -> Any:
        return example.context

    def state(self) -> dict[str, Any]:
        return {"may_be_none": self.may_be_none}

    def restore(self, labels: list[str], state: dict[str, Any]) -> None:
        self.may_be_none = state["may_be_none"]

    def of_model(self) -> dict[str, Any]:
        return {}

    def features(
        self,
        tokenizer: Any,
        examples: Sequence[Example],
        labelled: bool,
        learning: bool = False,
    ) -> Features:
        found = Features()
        for row, example in enumerate(examples):
            encoded = self._encoded(tokenizer, example)
            names = [name for name in tokenizer.model_input_names if name in encoded]
            windows = len(encoded["input_ids"])
            found.truncated += windows > 1 and self.stride is None
            added = False
            for window in range(windows if self.stride is not None else 1):
                seen = _context(encoded.sequence_ids(window), encoded["offset_mapping"][window])
                if seen is None:
                    continue
                inputs = {name: encoded[name][window] for name in names}
                if labelled:
                    place = _tokens(seen, example.answers or [])
                    if place is None and example.answers and learning and self.stride is None:
                        continue  # the answer was cut off
                    inputs["start_positions"], inputs["end_positions"] = place or (0, 0)
                found.add(row, inputs, seen)
                added = True
            found.left_out += not added
        return found

    def _encoded(self, tokenizer: Any, example: Example) -> Any:
        question = tokenizer(example.question, add_special_tokens=False, verbose=False)["input_ids"]
        # The question stays whole, and half of the rest is for what windows don't share.
        room = self.length - len(question) - tokenizer.num_special_tokens_to_add(pair=True)
        least = max(1, self.length // 8) + (self.stride or 0)
        if room < least:
            question = question[: len(question) - (least - room)]
            text = tokenizer.decode(question)
        else:
            text = example.question
        return self.windows(tokenizer, text, example.context, truncation="only_second")

    def figures(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> dict[str, float]:
        gold = [[answer for answer, _ in one.answers or []] for one in examples]
        found = self.predictions(features, examples, outputs)
        return metrics.of_answers(gold, [one["answer"] for one in found])

    def predictions(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> list[dict[str, Any]]:
        best: list[dict[str, Any] | None] = [None] * len(examples)
        none, logits = np.full(len(examples), np.inf), np.full(len(examples), -np.inf)
        for place, row in enumerate(features.rows):
            seen: Seen = features.places[place]
            starts, ends = (np.asarray(one[place], np.float64) for one in outputs)
            none[row] = min(none[row], starts[0] + ends[0])
            made = _best(seen, starts, ends, examples[row].context)
            if made["logit"] > logits[row]:
                best[row], logits[row] = made, made["logit"]
        found = []
        for row, answer in enumerate(best):
            if answer is None:
                answer = {"answer": "", "start": 0, "end": 0, "score": 0.0, "logit": -np.inf}
            if self.may_be_none:
                nothing = float(probabilities([none[row], answer["logit"]])[0])
                answer["none"] = nothing
                if nothing > 0.5:
                    answer |= {"answer": "", "start": 0, "end": 0}
            del answer["logit"]
            found.append(answer)
        return found


def _best(seen: Seen, starts: np.ndarray, ends: np.ndarray, context: str) -> dict[str, Any]:
    """The likeliest span of a window. score: its start's chance times its end's among the tokens of
    the context."""
    inside = slice(seen.first, seen.last + 1)
    some_starts = seen.first + np.argsort(-starts[inside])[:MOST]
    some_ends = seen.first + np.argsort(-ends[inside])[:MOST]
    pairs = [(s, e) for s in some_starts for e in some_ends if s <= e < s + LONGEST]
    if not pairs:
        pairs = [(s, s) for s in some_starts[:1]]
    start, end = max(pairs, key=lambda pair: starts[pair[0]] + ends[pair[1]])
    chance = probabilities(starts[inside])[start - seen.first]
    chance *= probabilities(ends[inside])[end - seen.first]
    first, last = seen.offsets[start][0], seen.offsets[end][1]
    return {
        **{"answer": context[first:last], "start": first, "end": last, "score": float(chance)},
        "logit": float(starts[start] + ends[end]),
    }


def _context(parts: list[int | None], offsets: list[tuple[int, int]]) -> Seen | None:
    """None: the context has no token, as one of control characters."""
    inside = [place for place, part in enumerate(parts) if part == 1]
    return Seen(inside[0], inside[-1], offsets) if inside else None


def _tokens(seen: Seen, answers: list[tuple[str, int]]) -> tuple[int, int] | None:
    """The first and last token of the first answer, if all of it is in the window."""
    if not answers:
        return None
    answer, begin = answers[0]
    inside = range(seen.first, seen.last + 1)
    offsets = seen.offsets
    if offsets[seen.first][0] > begin or offsets[seen.last][1] < begin + len(answer):
        return None
    start = max(place for place in inside if offsets[place][0] <= begin)
    end = min(place for place in inside if offsets[place][1] >= begin + len(answer))
    return start, max(start, end)


def _answers(told: Any, start: Any) -> list[tuple[str, int | None]]:
    """Of SQuAD's forms: {text: [...], answer_start: [...]}, [{text, answer_start}], or a string
    and a number; none for an empty one."""
    if isinstance(told, str) and told.startswith(("{", "[")):
        raise ValueError(f"the answer must be a text that the context has, got {told[:40]!r}")
    if isinstance(told, dict):
        texts, starts = told.get("text"), told.get("answer_start")
        if not isinstance(texts, list) or (starts is not None and len(starts) != len(texts)):
            raise ValueError("the answer must have as many text as answer_start")
        return [(string(t, "text"), s) for t, s in zip(texts, starts or [None] * len(texts))]  # noqa: B905
    if isinstance(told, list):
        if all(isinstance(one, str) for one in told):
            return [(one, None) for one in told]
        try:
            return [(string(one["text"], "text"), one.get("answer_start")) for one in told]
        except (KeyError, TypeError, AttributeError):
            raise ValueError("an answer must have a text") from None
    if told is None or not string(told, "answer").strip():
        return []
    if isinstance(start, str):
        if start.strip() and not start.strip().isdecimal():
            raise ValueError(f"answer_start must be a whole number, got {start!r}")
        start = int(start) if start.strip() else None
    if isinstance(start, float):
        start = int(start) if start.is_integer() else start
    return [(told, start)]


def _placed(context: str, answer: str, start: int | None) -> tuple[str, int]:
    """The answer and its place; of one without a place, the first."""
    if not answer.strip():
        raise ValueError("an answer is empty")
    if start is None:
        start = context.find(answer)
        if start < 0:
            raise ValueError(f"the context doesn't have the answer {answer[:40]!r}")
    elif isinstance(start, bool) or not isinstance(start, int):
        raise ValueError(f"answer_start must be a whole number, got {start!r}")
    elif start < 0 or context[start : start + len(answer)] != answer:
        raise ValueError(
            f"at {start} the context has {context[max(start, 0) :][: len(answer)][:40]!r}, not the "
            f"answer {answer[:40]!r}"
        )
    return answer, start
