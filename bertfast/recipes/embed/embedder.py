"""Embedder and CrossScorer: many texts in, rows of float32 out, in the order of the texts.

Texts are tokenised by a thread, a window ahead of the model; sorted by length within the window, so
that texts of one length lie together; and cut into batches of some tokens.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ... import checks
from ...commands import saved
from ..pretrain.prefetch import Prefetch
from . import encoders
from .encoders import Asked

AHEAD = 256  # batches that are made before the model takes them


class Counts(NamedTuple):
    """Of what has been computed so far."""

    texts: int = 0
    tokens: int = 0
    computed: int = 0  # tokens, with the padding that the model computes

    def __add__(self, more: "Counts") -> "Counts":  # type: ignore[override]
        return Counts(*(a + b for a, b in zip(self, more, strict=True)))

    def __sub__(self, less: "Counts") -> "Counts":
        return Counts(*(a - b for a, b in zip(self, less, strict=True)))


class _Batch(NamedTuple):
    rows: np.ndarray  # which of the window's
    features: dict[str, torch.Tensor]
    counts: Counts
    last: int  # texts of the window, where it is its last batch; else -1


class _Rows:
    """The two have in common how texts become batches."""

    def __init__(self, model: str | Path, asked: Asked, tokens: int, window: int) -> None:
        checks.check_int("tokens", tokens, 1)
        checks.check_int("window", window, 1)
        if not isinstance(model, (str, Path)):
            raise TypeError(f"model must be the path of a folder, got {checks.kind(model)}")
        self.model = Path(model)
        self.tokens, self.window = tokens, window
        self._asked = asked
        self._encoder: Any = None
        self.counts = Counts()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None, "counts": Counts()}

    @property
    def encoder(self) -> Any:
        """The model, loaded when it is first asked for."""
        if self._encoder is None:
            saved.need_transformers(type(self).__name__)
            self._encoder = self._load()
        return self._encoder

    def _load(self) -> Any:
        raise NotImplementedError

    def windows(
        self, items: Iterable[Sequence[Any]], told: Callable[[Counts], object] | None = None
    ) -> Iterator[np.ndarray]:
        """Rows for each list of texts. Lists to come are taken and tokenised ahead of the model.
        `told` is called with each batch's counts."""
        encoder = self.encoder
        ahead = Prefetch(self._batches(encoder, items), AHEAD)
        try:
            found: list[tuple[np.ndarray, torch.Tensor]] = []
            for batch in ahead:
                if len(batch.rows):
                    with torch.inference_mode():
                        found.append((batch.rows, encoder.run(batch.features)))
                self.counts += batch.counts
                if told is not None:
                    told(batch.counts)
                if batch.last >= 0:
                    yield _in_order(found, batch.last, encoder.width)
                    found = []
        finally:
            ahead.close()

    def _batches(self, encoder: Any, items: Iterable[Sequence[Any]]) -> Iterator[_Batch]:
        for window in items:
            if not len(window):
                yield _Batch(np.empty(0, np.int64), {}, Counts(), 0)
                continue
            encoded = encoder.tokenise(window)
            lengths = np.array([len(ids) for ids in encoded["input_ids"]])
            cuts = list(by_tokens(lengths, self.tokens))
            for number, rows in enumerate(cuts):
                features = encoder.loaded.features(encoded, rows)
                real = int(lengths[rows].sum())
                computed = real if encoder.loaded.packed else features["input_ids"].numel()
                last = len(window) if number == len(cuts) - 1 else -1
                yield _Batch(rows, features, Counts(len(rows), real, computed), last)

    def _all(self, items: Sequence[Any]) -> np.ndarray:
        cuts = [items[at : at + self.window] for at in range(0, len(items), self.window)]
        with contextlib.closing(self.windows(cuts or [[]])) as found:  # type: ignore[type-var]
            return np.concatenate(list(found))


def by_tokens(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """The rows of each batch, longest first: as many as have no more tokens, padding included, than
    the budget; at least one."""
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        count = max(1, budget // max(1, int(lengths[order[first]])))
        yield order[first : first + count]
        first += count


def _in_order(found: list[tuple[np.ndarray, torch.Tensor]], count: int, width: int) -> np.ndarray:
    """One copy from the device for all of a window's batches."""
    out = np.empty((count, width), np.float32)
    if found:
        out[np.concatenate([rows for rows, _ in found])] = (
            torch.cat([made for _, made in found]).cpu().numpy()
        )
    return out


class Embedder(_Rows):
    """Texts to vectors, by a folder of sentence-transformers or of transformers.

    It can be pickled, and loads the model when it is first called: so the class is what
    `ray.data.Dataset.map_batches` makes actors of, and what a pool's processes can be given.

    model: the folder. Where sentence-transformers saved it, its modules are followed.

    pooling: "mean" or "max" over a text's tokens, or "cls", its first. None: as the folder
    says, or mean.

    normalize: scale vectors to length 1. None: as the folder says, or not.

    prompt: put before each text.

    prompt_name: one of the folder's prompts. None: its default prompt, if it has one.

    length: the most tokens of a text; the rest is cut. None: as the folder says.

    tokens: the most tokens of a batch.

    window: texts that are sorted together.

    column: where batches are dicts of columns, as Ray Data's: which holds the texts.

    device: "auto" is a GPU where there is one.

    precision: "fp32", "bf16" or "fp16"; "auto" is fp16 on a GPU, else fp32.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        length: int | None = None,
        tokens: int = 8192,
        window: int = 8192,
        column: str = "text",
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        if length is not None:
            checks.check_int("length", length, 1)
        asked = Asked(pooling, normalize, prompt, prompt_name, length, device, precision)
        super().__init__(model, asked, tokens, window)
        self.column = column

    def _load(self) -> Any:
        found = encoders.plan(self.model, self._asked)
        if isinstance(found, str):
            return encoders.Library(self.model, found, self._asked)
        return encoders.Encoder(self.model, found, self._asked)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.encoder.width

    def windows(
        self, items: Iterable[Sequence[str]], told: Callable[[Counts], object] | None = None
    ) -> Iterator[np.ndarray]:
        if not isinstance(self.encoder, encoders.Library):
            yield from super().windows(items, told)
            return
        for window in items:
            if len(window):
                yield self.encoder.vectors(window)
            else:
                yield np.empty((0, self.encoder.width), np.float32)
            self.counts += Counts(len(window))
            if told is not None:
                told(Counts(len(window)))

    def __call__(self, texts: Any) -> Any:
        """float32 (texts, width), in their order. Of a dict of columns: the dict with a column
        `embedding` more."""
        if isinstance(texts, dict):
            if self.column not in texts:
                names = ", ".join(map(repr, texts)) or "(none)"
                raise ValueError(f"the batch has no {self.column!r} among its columns {names}")
            return {**texts, "embedding": self(list(texts[self.column]))}
        return self._all(_strings("texts", texts))


class CrossScorer(_Rows):
    """Pairs of texts to scores, by a folder of transformers' SequenceClassification.

    With one label the score is its sigmoid, as by sentence-transformers' CrossEncoder, if the
    folder's configuration names no other activation; with several it is a row of logits.

    It can be pickled, and loads the model when it is first called.

    model: the folder.

    length: the most tokens of a pair; the longer text is cut. None: as the folder says.

    tokens: the most tokens of a batch.

    window: pairs that are sorted together.

    device: "auto" is a GPU where there is one.

    precision: "fp32", "bf16" or "fp16"; "auto" is fp16 on a GPU, else fp32.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        length: int | None = None,
        tokens: int = 8192,
        window: int = 8192,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        if length is not None:
            checks.check_int("length", length, 1)
        asked = Asked(length=length, device=device, precision=precision)
        super().__init__(model, asked, tokens, window)

    def _load(self) -> Any:
        made = encoders.Scorer(self.model, self._asked)
        made.width = made.labels  # type: ignore[attr-defined]
        return made

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """float32 (pairs,) of one label, else (pairs, labels), in their order."""
        listed = list(pairs)
        for number, pair in enumerate(listed):
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"pairs[{number}] must be two texts, got {checks.said(pair)}")
            _strings(f"pairs[{number}]", pair)
        scores = self._all(listed)
        return scores[:, 0] if self.encoder.labels == 1 else scores


def _strings(name: str, texts: Any) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{name} must be a list of texts, got one text")
    listed = list(texts)
    for number, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{number}] must be a string, got {checks.kind(text)}")
    return listed
