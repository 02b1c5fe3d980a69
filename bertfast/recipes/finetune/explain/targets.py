"""The outputs of a model for each task: what it predicts, and which numbers are explained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....commands.errors import UserError, one_of
from .encoded import Encoded

MOST_TARGETS = 10
MOST_ANSWER = 30  # tokens of an answer
OUTSIDE = "O"  # the label of words that have none


@dataclass(frozen=True)
class Target:
    """One number of the outputs, or for an answer the sum of two."""

    name: str
    indices: tuple[tuple[int, ...], ...]  # in `outputs`, without the row
    probability: float | None  # None: the model gives a number, not probabilities
    token: tuple[int, int] | None = None  # the first and last that it is about


@dataclass(frozen=True)
class Prediction:
    task: str
    names: list[str]  # of labels
    targets: list[Target]  # most probable first
    # For "tag": each token's label and its probability, None where a token begins no word.
    of_tokens: list[tuple[str, float] | None] | None = None
    no_answer: float | None = None  # the probability that an answer isn't in the context


def outputs(model: Any, inputs: dict[str, torch.Tensor], task: str) -> torch.Tensor:
    """(rows, labels), or (rows, tokens, labels); of "qa" the labels are the start and the end."""
    made = model(**inputs)
    if task == "qa":
        return torch.stack((made.start_logits, made.end_logits), -1)
    return made.logits


def predict(model: nn.Module, encoded: Encoded, task: str) -> Prediction:
    with torch.no_grad():
        try:
            made = outputs(model, encoded.inputs, task)
        except AttributeError as error:
            raise _wrong_head(model, task) from error
    ndim, labels = (2, None) if task in ("classify", "pair") else (3, 2 if task == "qa" else None)
    if made.ndim != ndim or (labels and made.shape[-1] != labels):
        raise _wrong_head(model, task)
    config: Any = model.config
    names = [str(config.id2label.get(n, n)) for n in range(made.shape[-1])]
    return _BY_TASK[task](config, made[0].double().cpu(), encoded, task, names)


def _wrong_head(model: nn.Module, task: str) -> UserError:
    return UserError(f"{task!r} needs a model with its head, got a {type(model).__name__}")


def _classes(
    config: Any, logits: torch.Tensor, encoded: Encoded, task: str, names: list[str]
) -> Prediction:
    if len(names) == 1 or config.problem_type == "regression":
        targets = [Target(name, ((n,),), None) for n, name in enumerate(names)]
        return Prediction(task, names, targets)
    several = config.problem_type == "multi_label_classification"
    probability = logits.sigmoid() if several else logits.softmax(0)
    order = probability.argsort(descending=True, stable=True).tolist()
    targets = [Target(names[n], ((n,),), float(probability[n])) for n in order]
    return Prediction(task, names, targets)


def _tags(
    config: Any, logits: torch.Tensor, encoded: Encoded, task: str, names: list[str]
) -> Prediction:
    probability, label = logits.softmax(-1).max(-1)
    targets: list[Target] = []
    of_tokens: list[tuple[str, float] | None] = []
    for place, token in enumerate(encoded.tokens):
        if not token.begins:
            of_tokens.append(None)
            continue
        chosen, certain = int(label[place]), float(probability[place])
        of_tokens.append((names[chosen], certain))
        index = ((place, chosen),)
        targets.append(Target(names[chosen], index, certain, (place, place)))
    targets.sort(key=lambda target: (target.name == OUTSIDE, -(target.probability or 0.0)))
    return Prediction(task, names, targets, of_tokens)


def _answer(
    config: Any, logits: torch.Tensor, encoded: Encoded, task: str, names: list[str]
) -> Prediction:
    starts, ends = logits.softmax(0).unbind(-1)
    context = torch.tensor([token.segment == 1 for token in encoded.tokens])
    # ends of an answer that starts there: not before it, and not far behind
    allowed = torch.ones(len(context), len(context)).triu().tril(MOST_ANSWER - 1).bool()
    allowed &= context[:, None] & context
    joint = torch.where(allowed, starts[:, None] * ends, -1.0)
    start, end = divmod(int(joint.argmax()), len(context))
    span = (start, end)
    targets = [
        Target("answer (start + end)", ((start, 0), (end, 1)), float(joint[span]), span),
        Target("start of the answer", ((start, 0),), float(starts[start]), (start, start)),
        Target("end of the answer", ((end, 1),), float(ends[end]), (end, end)),
    ]
    return Prediction(task, ["start", "end"], targets, None, float(starts[0] * ends[0]))


_BY_TASK: dict[str, Callable[..., Prediction]] = {
    "classify": _classes,
    "pair": _classes,
    "tag": _tags,
    "qa": _answer,
}


def targets_of(
    prediction: Prediction, encoded: Encoded, labels: Sequence[str] | None
) -> list[Target]:
    """Those to explain: of the given labels, or the most probable ones."""
    targets = prediction.targets
    if labels is None:
        return targets[:MOST_TARGETS]
    if prediction.task == "qa":
        raise UserError("an answer has no labels to choose from; leave them out")
    for label in labels:
        one_of("a label to explain", label, prediction.names)
    chosen = [target for target in targets if target.name in labels][:MOST_TARGETS]
    if not chosen:
        raise UserError(f"no word of the text is labelled {', '.join(labels)}")
    return chosen
