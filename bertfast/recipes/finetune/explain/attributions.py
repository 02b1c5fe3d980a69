"""Integrated gradients of a model's outputs by its word embeddings, by captum.

    a_t = sum over width of (x_t - b_t) * mean over s in [0, 1] of d output / d x_t at b + s (x - b)

x are the word embeddings of the text, b those of padding, with the tokens that the tokenizer adds
left where they are. Positions, segments and the mask are the text's all along. The attributions of
all tokens sum to output(x) - output(b), but for the error of the integral: the convergence delta.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .encoded import Encoded
from .targets import Target, outputs

STEPS = (32, 64, 128, 256)  # points of the integral; more are tried until it converges
MOST_DELTA = 0.01  # of the sum of the attributions' sizes
MOST_AT_ONCE = 8192  # tokens of a batch


@dataclass(frozen=True)
class Attribution:
    target: Target
    scores: torch.Tensor  # float64, one for each token
    output: float
    baseline: float  # the output for padding
    steps: int

    @property
    def delta(self) -> float:
        """The convergence delta: by how much the scores' sum misses the outputs' difference."""
        return float(self.scores.sum()) - (self.output - self.baseline)

    @property
    def converged(self) -> bool:
        return abs(self.delta) <= MOST_DELTA * float(self.scores.abs().sum())


def attributions_of(
    model: nn.Module, encoded: Encoded, task: str, targets: list[Target]
) -> list[Attribution]:
    """Of each target. A sum of outputs has the sum of their attributions."""
    by_index: dict[tuple[int, ...], Attribution] = {}
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    call = _call(model, encoded, task)
    with torch.no_grad():
        at_text = call(encoded.inputs["input_ids"])[0]
        with _replaced(embeddings, encoded.baseline):
            at_padding = call(encoded.inputs["input_ids"])[0]
    for target in targets:
        for index in target.indices:
            if index not in by_index:
                known = Attribution(
                    target, torch.zeros(0), float(at_text[index]), float(at_padding[index]), 0
                )
                by_index[index] = _integrate(call, embeddings, encoded, index, known)
    return [_sum(target, [by_index[index] for index in target.indices]) for target in targets]


def _call(model: nn.Module, encoded: Encoded, task: str) -> Callable[[torch.Tensor], torch.Tensor]:
    others = {name: made for name, made in encoded.inputs.items() if name != "input_ids"}

    def call(ids: torch.Tensor) -> torch.Tensor:
        rows = {name: made.expand(len(ids), -1) for name, made in others.items()}
        return outputs(model, {"input_ids": ids, **rows}, task)

    return call


@contextmanager
def _replaced(embeddings: nn.Module, ids: torch.Tensor) -> Iterator[None]:
    """Other tokens' embeddings: the model itself goes on seeing the text's ids, by which RoBERTa
    numbers positions."""
    others = embeddings(ids)
    handle = embeddings.register_forward_hook(lambda *_: others)
    try:
        yield
    finally:
        handle.remove()


def _integrate(
    call: Callable[[torch.Tensor], torch.Tensor],
    embeddings: nn.Module,
    encoded: Encoded,
    index: tuple[int, ...],
    known: Attribution,
) -> Attribution:
    from captum.attr import LayerIntegratedGradients

    method = LayerIntegratedGradients(call, embeddings)
    for steps in STEPS:
        with torch.enable_grad():
            made = method.attribute(
                encoded.inputs["input_ids"],
                baselines=encoded.baseline,
                target=index if len(index) > 1 else index[0],
                n_steps=steps,
                internal_batch_size=max(1, MOST_AT_ONCE // len(encoded)),
            )
        scores = made[0].detach().double().sum(-1).cpu()
        found = dataclasses.replace(known, scores=scores, steps=steps)
        if found.converged:
            break
    return found


def _sum(target: Target, parts: list[Attribution]) -> Attribution:
    return Attribution(
        target,
        torch.stack([part.scores for part in parts]).sum(0),
        sum(part.output for part in parts),
        sum(part.baseline for part in parts),
        max(part.steps for part in parts),
    )
