"""A small BERT learns, by the recipe's own commands, from text that every Python brings along.

    OMP_NUM_THREADS=2 python benchmarks/pretrain_learns.py

Prepares the text (python_text.py) once. Then for each seed it trains MLM + NSP for five minutes
(4 layers, width 256, vocabulary 4,096, length 64), and evaluates on documents that were kept from
training, with further masks and pairs until there are 2,000 pairs. The goals: an MLM loss 0.2 nats
under the cross-entropy of the tokens' frequencies, and 55 % of pairs told right.

How long a step takes isn't known beforehand. So training begins with more steps than there is time
for, at a level rate after the warm-up; SIGTERM stops it after most of the time; and it goes on from
the checkpoint to a number of steps whose last tenth, in which the rate goes down, is still to come.
"""

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Threads that wait for each other sleep: on a machine that has other work, those that spin make
# training 20 times slower. It is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pretrain_report  # noqa: E402
import python_text  # noqa: E402
import torch  # noqa: E402

from bertfast.commands.bench.record import environment  # noqa: E402
from bertfast.recipes.pretrain.__main__ import run  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "pretrain-learns.json"
GOALS = {"nats_under_unigram": 0.2, "nsp_accuracy": 0.55, "pairs": 2000}
LENGTH, TOKENS = 64, 2048  # of a sequence, of a step
MODEL = {"layers": 4, "width": 256, "heads": 4}
VOCABULARY, HELD_OUT = 4096, 0.1
TRAINED = {"lr": 1e-3, "warmup": 100, "dropout": 0.0, "schedule": "wsd", "recipe": "bert-2018"}
FIRST = 0.84  # of the time, until SIGTERM; then a ninth of the steps is left
LEVEL = 10**7  # steps that are never reached


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="of training, each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--characters", type=int, help="of text, instead of all")
    parser.add_argument("--pairs", type=int, default=GOALS["pairs"], help="of the evaluation")
    told = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), told)
    told.out.parent.mkdir(parents=True, exist_ok=True)
    told.out.write_text(json.dumps(result, indent=1) + "\n")
    pretrain_report.draw_learning(result, told.out.with_suffix(".png"))
    for one in result["runs"]:
        figures = one["held_out"]
        print(
            f"seed {one['seed']}: {one['steps']} steps in {one['seconds']:.0f} s, MLM "
            f"{figures['mlm_loss']:.3f}, by frequencies {figures['unigram_cross_entropy']:.3f}, "
            f"NSP {100 * figures['nsp_accuracy']:.1f} % of {figures['pairs']} pairs"
        )
    return 0 if pretrain_report.meets(result) else 1


def measure(folder: Path, told: argparse.Namespace) -> dict[str, Any]:
    text = python_text.write(folder / "text.jsonl", told.characters)
    data = folder / "data"
    call("prepare", folder / "text.jsonl", data=data, vocabulary=VOCABULARY, held_out=HELD_OUT)
    runs = [learn(folder / f"seed-{seed}", data, seed, told) for seed in told.seeds]
    return {
        "goals": GOALS,
        "environment": {**asdict(environment("cpu")), "threads": torch.get_num_threads()},
        "text": text,
        "settings": {
            **MODEL,
            **TRAINED,
            **{"length": LENGTH, "tokens": TOKENS, "vocabulary": VOCABULARY},
            **{"held_out": HELD_OUT, "seconds": told.seconds},
        },
        "runs": runs,
    }


def learn(folder: Path, data: Path, seed: int, told: argparse.Namespace) -> dict[str, Any]:
    load = os.getloadavg()[0]
    options = {
        **{"data": data, "out": folder, "seed": seed, "length": LENGTH, "tokens": TOKENS},
        **{"micro_batches": 1, "print_every": 20, "evaluate_every": 200, "checkpoint_every": LEVEL},
        **MODEL,
        **TRAINED,
    }
    begun = time.monotonic()
    stopper = Stopper(folder / "metrics.jsonl", begun + FIRST * told.seconds)
    with stopper:
        status = call("train", steps=LEVEL, **options)
    if status != 128 + signal.SIGTERM:
        raise RuntimeError(f"training ended with status {status} before it was stopped")
    (checkpoint,) = (folder / "checkpoints").iterdir()
    done = step_of(checkpoint)
    steps = math.ceil(done / 0.9)
    if call("train", steps=steps, **options):
        raise RuntimeError("training didn't go on to its end")
    seconds = time.monotonic() - begun
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["kind"] == "train"]
    return {
        "seed": seed,
        "load_average": load,
        "seconds": round(seconds, 1),
        "steps": steps,
        "stopped_after": done,
        "tokens_per_second": round(sum(x["tokens_per_second"] for x in training) / len(training)),
        "input_wait": round(sum(x["input_wait"] for x in training) / len(training), 4),
        "held_out": evaluate(folder / "model", data, told.pairs),
        "curve": [[x["step"], round(x["mlm_loss"], 4)] for x in training],
        "held_out_curve": [
            [x["step"], round(x["mlm_loss"], 4), round(x["nsp_accuracy"], 4)]
            for x in lines
            if x["kind"] == "held-out"
        ],
    }


class Stopper:
    """Sends this process SIGTERM at a time, but not before the first figures are there."""

    def __init__(self, figures: Path, when: float) -> None:
        self.figures, self.when = figures, when
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._wait)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _wait(self) -> None:
        while time.monotonic() < self.when or not self.figures.exists():
            if self._over.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGTERM)


def evaluate(model: Path, data: Path, pairs: int) -> dict[str, Any]:
    """Over all held-out text, with other masks and pairs each time, until there are so many."""
    sums = dict.fromkeys(("mlm_loss", "unigram_cross_entropy", "nsp_accuracy"), 0.0)
    labels = seen = rounds = 0
    while seen < pairs:
        call("evaluate", data=data, model=model, length=LENGTH, tokens=8192, seed=rounds)
        figures = json.loads((model / "evaluation.json").read_text())["figures"]
        for name in sums:
            weight = figures["sequences" if name.startswith("nsp") else "labels"]
            sums[name] += figures[name] * weight
        labels, seen, rounds = (
            labels + int(figures["labels"]),
            seen + int(figures["sequences"]),
            rounds + 1,
        )
    counts = {"labels": labels, "pairs": seen, "rounds": rounds}
    means = {n: round(v / (seen if n.startswith("nsp") else labels), 4) for n, v in sums.items()}
    return {**means, **counts}


def call(command: str, *arguments: object, **options: object) -> int:
    """A command of the recipe; its exit status."""
    words = [command, *map(str, arguments)]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return run(words)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


if __name__ == "__main__":
    sys.exit(main())
