"""Prepared text and short runs of the pre-training recipe."""

import json
from pathlib import Path
from typing import Any

import torch

from bertfast.recipes.pretrain.options import TrainOptions
from bertfast.recipes.pretrain.parallel import Processes
from bertfast.recipes.pretrain.prepare import prepare
from bertfast.recipes.pretrain.train import train

ALONE = Processes(0, 1, torch.device("cpu"))
WORDS = "the cat dog sat ran on under mat road house and then old red big small it was".split()


def texts(folder: Path, documents: int = 40) -> Path:
    """A file of documents of some sentences each."""
    generator = torch.Generator().manual_seed(1)
    lines = []
    for _ in range(documents):
        for _ in range(int(torch.randint(3, 9, (), generator=generator))):
            drawn = torch.randint(len(WORDS), (8,), generator=generator).tolist()
            lines.append(" ".join(WORDS[i] for i in drawn).capitalize() + ".")
        lines.append("")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def prepared(folder: Path) -> Path:
    """Its texts, prepared."""
    source = [texts(folder / "texts")]
    prepare(source, folder / "data", vocabulary=60, held_out=0.1, progress=False)
    return folder / "data"


def options(data: Path, run: Path, **changes: Any) -> TrainOptions:
    """A model of one layer, and steps of two micro-batches."""
    given: dict[str, Any] = dict(
        **dict(data=data, out=run, layers=1, width=32, heads=2, inner=48, device="cpu"),
        **dict(length=32, tokens=128, micro_batches=2, steps=8, lr=1e-3, warmup=2),
        **dict(print_every=1, checkpoint_every=3),
    )
    return TrainOptions(**given | changes)


def trained(data: Path, run: Path, **changes: Any) -> list[dict[str, Any]]:
    """The figures of a run in this process, a line a step."""
    assert train(options(data, run, **changes), ALONE) == 0
    return figures(run)


# Those that don't depend on time and memory.
EXACT = ("loss", "mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy", "lr", "gradient_norm")


def figures(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [told for told in lines if told["kind"] == "train"]
    return [{name: told[name] for name in ("step", *EXACT) if name in told} for told in steps]
