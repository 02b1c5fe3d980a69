"""Words to tags: entities, as spans of the text, or a tag of each word.

A word's first token carries its tag. A text longer than the model's limit is cut, or goes through
in windows that share some tokens (`stride`); of a word that several windows see, the one counts in
which it is farthest from the window's ends.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ....commands.errors import UserError
from ...records import listed, string
from .. import metrics
from ..features import Features
from ..tables import Role
from .base import Task, in_order, probabilities, text_of

IGNORED = -100  # what transformers' losses pass over


class Example(NamedTuple):
    text: str
    words: list[str] | None  # None: the tokenizer finds them
    tags: list[str] | None = None


class Seen(NamedTuple):
    """The words of a window: their first tokens, how far these are from the window's ends, and
    where the words begin and end in the text, or of words that were given in themselves."""

    tokens: list[int]
    words: list[int]
    context: list[int]
    spans: list[tuple[int, int]]


class Tag(Task):
    """Words to tags."""

    name = "tag"
    auto, adapted = "AutoModelForTokenClassification", "TOKEN_CLS"
    roles = {
        "text": Role(("tokens", "words", "text", "sentence")),
        "label": Role(("tags", "ner_tags", "labels", "label", "pos_tags", "pos"), (True, False)),
    }

    @property
    def entities(self) -> bool:
        return metrics.are_entities(self.labels)

    @property
    def figures_known(self) -> tuple[str, ...]:
        if self.entities:
            return ("f1", "precision", "recall", "accuracy")
        return ("accuracy", "f1_macro", "precision_macro", "recall_macro")

    def parse(self, cells: dict[str, Any]) -> Example:
        if "label" not in cells:
            if isinstance(cells.get("text"), str):
                return Example(text_of(cells, "text"), None)
            words = _listed(cells.get("text"), "text")
            return Example(" ".join(words), words)
        words, tags = _listed(cells.get("text"), "text"), _listed(cells["label"], "label")
        if len(words) != len(tags):
            raise ValueError(f"there are {len(words)} words and {len(tags)} tags")
        return Example(" ".join(words), words, tags)

    def learn(self, examples: Sequence[Example]) -> None:
        self.labels = in_order(tag for one in examples for tag in one.tags or ())
        if len(self.labels) < 2:
            raise UserError(f"all words have the tag {self.labels[0]!r}: there is nothing to tell")

    def check(self, example: Example) -> None:
        for tag in example.tags or ():
            if tag not in self.labels:
                raise ValueError(f"a tag is {tag!r}, and training has {listed(self.labels)}")

    def counts(self, examples: Iterable[Example]) -> list[int]:
        found = Counter(tag for one in examples for tag in one.tags or ())
        return [found[label] for label in self.labels]

    def features(
        self,
        tokenizer: Any,
        examples: Sequence[Example],
        labelled: bool,
        learning: bool = False,
    ) -> Features:
        found = Features()
        number = {label: number for number, label in enumerate(self.labels)}
        for row, example in enumerate(examples):
            encoded = self.windows(
                tokenizer,
                example.text if example.words is None else example.words,
                is_split_into_words=example.words is not None,
                truncation=True,
            )
            windows = len(encoded["input_ids"])
            found.truncated += windows > 1 and self.stride is None
            names = [name for name in tokenizer.model_input_names if name in encoded]
            begun: dict[int, int] = {}
            for window in range(windows if self.stride is not None else 1):
                seen = _seen(encoded.word_ids(window), encoded["offset_mapping"][window], begun)
                inputs = {name: encoded[name][window] for name in names}
                if labelled:
                    labels = [IGNORED] * len(inputs["input_ids"])
                    assert example.tags is not None
                    for token, word in zip(seen.tokens, seen.words, strict=True):
                        labels[token] = number[example.tags[word]]
                    inputs["labels"] = labels
                found.add(row, inputs, seen)
        return found

    def figures(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> dict[str, float]:
        gold, best = self._tags(features, examples, outputs)
        if self.entities:
            return metrics.of_entities(gold, best)
        number = {label: number for number, label in enumerate(self.labels)}
        flat = np.array([number[tag] for tags in gold for tag in tags])
        one_hot = np.eye(len(self.labels))[[number[tag] for tags in best for tag in tags]]
        found = metrics.of_classes(flat, one_hot)
        return {name: found[name] for name in self.figures_known}

    def tables(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> dict[str, Any]:
        gold, best = self._tags(features, examples, outputs)
        if self.entities:
            return metrics.of_each_entity(gold, best)
        return metrics.of_each_class(sum(gold, []), sum(best, []), self.labels)

    def predictions(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> list[dict[str, Any]]:
        found = []
        for row, words in enumerate(self._words(features, examples, outputs)):
            text = examples[row].text
            if self.entities:
                found.append({"text": text, "spans": self._spans(text, words)})
            else:
                spans = [_span(text, [word], word.tag) for word in words]
                found.append({"text": text, "spans": spans})
        return found

    def _spans(self, text: str, words: list["Word"]) -> list[dict[str, Any]]:
        from seqeval.metrics.sequence_labeling import get_entities

        return [
            _span(text, words[first : last + 1], kind)
            for kind, first, last in get_entities([word.tag for word in words])
        ]

    def _tags(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> tuple[list[list[str]], list[list[str]]]:
        """Of all words, true and predicted; a word that no window sees has O, or the tag that is
        the most common."""
        unseen = "O" if "O" in self.labels else self._most_common(examples)
        gold, best = [], []
        for example, words in zip(examples, self._words(features, examples, outputs), strict=True):
            assert example.tags is not None
            tags = [unseen] * len(example.tags)
            for word in words:
                tags[word.number] = word.tag
            gold.append(example.tags)
            best.append(tags)
        return gold, best

    def _most_common(self, examples: Sequence[Example]) -> str:
        return self.labels[int(np.argmax(self.counts(examples)))]

    def _words(
        self, features: Features, examples: Sequence[Example], outputs: Any
    ) -> list[list["Word"]]:
        """The words of each row that a window sees, in their order."""
        found: list[dict[int, tuple[int, Word]]] = [{} for _ in examples]
        for place, row in enumerate(features.rows):
            seen: Seen = features.places[place]
            chances = probabilities(np.asarray(outputs[place])[seen.tokens])
            starts = _starts(examples[row].words)
            for index, word in enumerate(seen.words):
                context = seen.context[index]
                if word in found[row] and found[row][word][0] >= context:
                    continue
                best = int(chances[index].argmax())
                base = 0 if starts is None else starts[word]
                start, end = seen.spans[index]
                made = Word(
                    *(word, base + start, base + end),
                    *(self.labels[best], float(chances[index, best])),
                )
                found[row][word] = (context, made)
        return [[words[word][1] for word in sorted(words)] for words in found]


class Word(NamedTuple):
    number: int  # among the text's
    start: int
    end: int
    tag: str
    score: float


def _span(text: str, words: list[Word], label: str) -> dict[str, Any]:
    start, end = words[0].start, words[-1].end
    score = float(np.mean([word.score for word in words]))
    return {"start": start, "end": end, "text": text[start:end], "label": label, "score": score}


def _seen(words: list[int | None], offsets: list[tuple[int, int]], begun: dict[int, int]) -> Seen:
    """The words that begin in a window. begun: where those of the windows before it begin; a window
    may open in the midst of one."""
    found = Seen([], [], [], [])
    ends = {word: end for word, (_, end) in zip(words, offsets, strict=True) if word is not None}
    inside = [place for place, word in enumerate(words) if word is not None]
    last = None
    for place in inside:
        word = words[place]
        if word is not None and word != last:
            if begun.setdefault(word, offsets[place][0]) == offsets[place][0]:
                found.tokens.append(place)
                found.words.append(word)
                found.context.append(min(place - inside[0], inside[-1] - place))
                found.spans.append((offsets[place][0], ends[word]))
        last = word
    return found


def _starts(words: list[str] | None) -> list[int] | None:
    """Places in the text, words joined by spaces; None: offsets are the text's own."""
    if words is None:
        return None
    return [0, *np.cumsum([len(word) + 1 for word in words[:-1]]).tolist()]


def _listed(value: Any, role: str) -> list[str]:
    """Words or tags: a list, or a string with spaces between."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        if any(isinstance(one, int) and not isinstance(one, bool) for one in value):
            value = [str(one) for one in value]  # numbers of tags
        found = [string(one, role) for one in value]
        if any(not one or one.isspace() for one in found):
            raise ValueError(f"the {role} has an empty element")
    elif isinstance(value, str) and value.lstrip().startswith("["):
        raise ValueError(
            f"the {role} must be a list, or words with spaces between, got {value[:40]!r}"
        )
    else:
        found = string(value, role).split()
    if not found:
        raise ValueError(f"the {role} is empty")
    return found
