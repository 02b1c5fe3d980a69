"""Evaluation on documents that training never sees: the same masks and pairs each time.

Beside the MLM loss stands the cross-entropy of the same labels by how often each token comes in the
text of training: below it a model has learned more than frequencies.
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...commands.errors import UserError
from . import card
from . import model as models
from .batches import DataOptions
from .options import EVALUATED_SHARE, EvaluateOptions, as_json
from .packed import PackedBatch
from .parallel import Processes
from .precision import Precision
from .prepared import Prepared, data_options


@torch.no_grad()
def evaluate(
    module: models.Pretraining,
    data: Prepared,
    processes: Processes,
    precision: Precision,
    *,
    tokens: int,
    length: int,
    masked_share: float = EVALUATED_SHARE,
    seed: int = 0,
) -> dict[str, float]:
    """The figures of a model, over all processes; called by all. All labelled tokens count for the
    accuracy."""
    options = data_options(
        tokens=tokens, length=length, nsp=module.nsp, masked_share=masked_share, seed=seed
    )
    information = -np.log(shares(data.counts()))
    sums = torch.zeros(len(models.Sums._fields), dtype=torch.float64, device=processes.device)
    labels = sequences = seen = 0
    unigram = 0.0
    training = module.training
    module.eval()
    # A compiled form is training's. Asking for it would import the compiler.
    eager: Any = contextlib.nullcontext()
    if module._compiled_call_impl is not None:
        eager = torch.compiler.set_stance("force_eager")
    try:
        for batch, counts in _rounds(data, options, processes):
            with eager, precision.autocast():
                found = module(batch.to(processes.device), len(batch.labels))
            if counts:
                sums += torch.stack([part.to(torch.float64) for part in found])
                labels += len(batch.labels)
                sequences += batch.sequences
                seen += batch.tokens
                unigram += float(information[batch.labels.numpy()].sum())
    finally:
        module.train(training)
    values = processes.add_up([*sums.tolist(), labels, sequences, seen, unigram])
    mlm, nsp, nsp_right, mlm_right, all_labels, all_sequences, all_tokens, frequencies = values
    figures = {
        "mlm_loss": mlm / all_labels,
        "mlm_accuracy": mlm_right / all_labels,
        "unigram_cross_entropy": frequencies / all_labels,
    }
    if module.nsp:
        figures["nsp_loss"] = nsp / all_sequences
        figures["nsp_accuracy"] = nsp_right / all_sequences
    counted = {"labels": all_labels, "sequences": all_sequences, "tokens": all_tokens}
    return {**figures, **counted}


def _rounds(
    data: Prepared, options: DataOptions, processes: Processes
) -> Iterator[tuple[PackedBatch, bool]]:
    """A process's batches, and True where they count. Sharded models are run by all processes or
    by none, so one that has no batch left runs an earlier one again."""
    from tqdm import tqdm

    own = iter(data.batches(options, "held-out", None, processes.rank, processes.world))
    total = data.shards.split("held-out").tokens // processes.world
    hidden = not (processes.first and sys.stderr.isatty())
    bar = tqdm(total=total, desc="held-out", unit=" tokens", leave=False, disable=hidden)
    spare: PackedBatch | None = None
    while True:
        found = next(own, None)
        (others,) = processes.add_up([found is not None])
        if not others:
            bar.close()
            return
        if found is not None:
            spare = found[1]
            bar.update(spare.tokens)
            yield spare, True
            continue
        if spare is None:
            ((_, spare),) = itertools.islice(data.batches(options, "held-out"), 1)
        yield spare, False


def shares(counts: np.ndarray) -> np.ndarray:
    """Of each token, as if each had been counted once more."""
    return (counts + 1.0) / (counts.sum() + len(counts))


def said(figures: dict[str, float]) -> str:
    """The figures as they are printed."""
    parts = [
        f"held-out: MLM {figures['mlm_loss']:.4f} ({100 * figures['mlm_accuracy']:.1f} % right)",
        f"by frequencies {figures['unigram_cross_entropy']:.4f}",
    ]
    if "nsp_loss" in figures:
        parts.append(f"NSP {figures['nsp_loss']:.4f} ({100 * figures['nsp_accuracy']:.1f} %)")
    parts.append(f"{figures['labels']:,.0f} tokens predicted")
    return " | ".join(parts)


def evaluate_folder(given: EvaluateOptions, processes: Processes) -> int:
    """The `evaluate` command: prints a saved model's figures and adds them to its folder, as
    evaluation.json and in its card."""
    data = Prepared.open(given.data)
    nsp = has_nsp(given.model) if given.nsp is None else given.nsp
    if not data.holds_out(nsp):
        raise UserError(
            f"--data: {str(given.data)!r} has no documents to evaluate on: prepare it with a "
            "larger --held-out"
        )
    model, missing = models.load(given.model, nsp)
    if missing:
        raise UserError(
            f"--model: {str(given.model)!r} has no weights for {', '.join(missing)}: what it "
            "wasn't trained on can't be evaluated"
        )
    models.check_fits(model.config, data.vocabulary, given.length, nsp)
    module = models.Pretraining(model).to(processes.device)
    figures = evaluate(
        *(module, data, processes, Precision(given.precision, processes.device)),
        tokens=given.tokens,
        length=given.length,
        masked_share=given.masked_share,
        seed=given.seed,
    )
    if processes.first:
        print(said(figures))
        card.add_evaluation(given.model, figures, as_json(given))
    return 0


def has_nsp(folder: Path) -> bool:
    """True if a saved model was made with a head for pairs."""
    try:
        told = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False  # loading it has an error for it
    return "BertForPreTraining" in (told.get("architectures") or ())
