"""Figures of a task: scikit-learn's, seqeval's and SciPy's, and SQuAD's own two."""

import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


def of_classes(gold: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Of labels by their numbers. With two labels also those of the second one."""
    from sklearn import metrics

    best = probabilities.argmax(-1)
    count = probabilities.shape[1]
    found = {"accuracy": metrics.accuracy_score(gold, best)}
    figures = {
        "f1": metrics.f1_score,
        "precision": metrics.precision_score,
        "recall": metrics.recall_score,
    }
    for name, figure in figures.items():
        every = {"labels": range(count), "zero_division": 0}
        found[f"{name}_macro"] = figure(gold, best, average="macro", **every)
        if count == 2:
            found[name] = figure(gold, best, zero_division=0)
    if len(np.unique(gold)) == count:  # else it isn't defined
        scores: Any = probabilities[:, 1] if count == 2 else probabilities
        found["roc_auc"] = metrics.roc_auc_score(gold, scores, multi_class="ovr", average="macro")
    return {name: float(value) for name, value in found.items()}


def of_each_class(
    gold: Sequence[str], best: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
    from sklearn import metrics

    told = metrics.classification_report(
        gold, best, labels=list(labels), output_dict=True, zero_division=0
    )
    matrix = metrics.confusion_matrix(gold, best, labels=list(labels))
    return {
        "labels": list(labels),
        "confusion": matrix.tolist(),  # rows: the true label, columns: the predicted one
        "each": {label: _plain(told[label]) for label in labels},
    }


def of_scores(gold: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Correlations; none where one side is constant, as they aren't defined there."""
    from scipy import stats

    if len(gold) < 2 or np.ptp(gold) == 0 or np.ptp(found) == 0:
        return {}
    return {
        "spearman": float(stats.spearmanr(gold, found).statistic),
        "pearson": float(stats.pearsonr(gold, found).statistic),
    }


def are_entities(labels: Sequence[str]) -> bool:
    """True for tags such as B-PER, I-PER, O; others are words' own, such as parts of speech."""
    return all(re.fullmatch(r"O|[BIESLU]-.+", label) for label in labels) and "O" in labels


def of_entities(gold: list[list[str]], best: list[list[str]]) -> dict[str, float]:
    from seqeval import metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be no entity on one side
        return {
            "f1": float(metrics.f1_score(gold, best, zero_division=0)),
            "precision": float(metrics.precision_score(gold, best, zero_division=0)),
            "recall": float(metrics.recall_score(gold, best, zero_division=0)),
            "accuracy": float(metrics.accuracy_score(gold, best)),
        }


def of_each_entity(gold: list[list[str]], best: list[list[str]]) -> dict[str, Any]:
    from seqeval import metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = metrics.classification_report(gold, best, output_dict=True, zero_division=0)
    return {"each": {name: _plain(row) for name, row in told.items() if " avg" not in name}}


def of_answers(gold: Sequence[Sequence[str]], found: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 of words, the best over a question's answers (Rajpurkar et al.,
    arXiv 1606.05250, with the normalisation of its evaluation script)."""
    exact, f1 = [], []
    for answers, answer in zip(gold, found, strict=True):
        known = [normal(one) for one in answers] or [""]
        exact.append(max(float(normal(answer) == one) for one in known))
        f1.append(max(_words_in_common(normal(answer).split(), one.split()) for one in known))
    return {"f1": float(np.mean(f1)), "exact": float(np.mean(exact))}


def normal(answer: str) -> str:
    """Without case, punctuation, articles and surplus space."""
    letters = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def _words_in_common(found: list[str], gold: list[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    common = sum((Counter(found) & Counter(gold)).values())
    return 2 * common / (len(found) + len(gold))


def _plain(row: dict[str, Any]) -> dict[str, float]:
    return {name.removesuffix("-score"): float(value) for name, value in row.items()}
