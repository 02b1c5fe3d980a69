"""Pre-training killed at random points, and gone on with: the same losses as if it hadn't been.

    python benchmarks/pretrain_kills.py [--points 20] [--seed 0] [--out FILE]

A run of a small BERT with dropout, MLM and NSP on text of Python's documentation is killed with
SIGKILL at a random moment of a random step, and the same command goes on from its latest
checkpoint. Every printed loss, accuracy and gradient norm must then be that of a run that was left
alone: to the bit in one process, to 1e-6 in two (of which a random one is killed first). Each point
is a run of its own. Writes benchmarks/results/pretrain-kills.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import transformers  # noqa: E402, F401  before the forks, as it takes seconds

from bertfast.commands.bench.record import environment  # noqa: E402
from bertfast.recipes.pretrain import meter  # noqa: E402
from bertfast.recipes.pretrain.options import TrainOptions  # noqa: E402
from bertfast.recipes.pretrain.parallel import started  # noqa: E402
from bertfast.recipes.pretrain.prepare import prepare  # noqa: E402
from bertfast.recipes.pretrain.train import train  # noqa: E402

STEPS, EVERY = 30, 4
COMPARED = ("loss", "mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy", "lr", "gradient_norm")
BOUND = 1e-6  # relative, of two processes
PATIENCE = 120.0  # seconds for a run to come to the step at which it is killed


class Outcome(NamedTuple):
    """The outcome of a kill and of going on."""

    step: int  # lines there were
    resumed: int  # lines that its checkpoint kept
    difference: float  # the largest relative one of any figure; 0: the same bits


def child(work: Callable[[], int]) -> int:
    """Starts a process; its number. What it prints is lost, but for errors."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        status = work()
    except BaseException as error:
        if not isinstance(error, RuntimeError):  # gloo's, when another process was killed
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def waited(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def make_data(folder: Path) -> Path:
    """The text of Python's help topics, prepared."""

    def work() -> int:
        import pydoc_data.topics as help_topics

        text = "\n\n".join(help_topics.topics[name] for name in sorted(help_topics.topics)[:20])
        (folder / "text.txt").write_text(text)
        prepare([folder / "text.txt"], folder / "data", vocabulary=500, progress=False)
        return 0

    if waited(child(work)):
        raise SystemExit("the text can't be prepared")
    return folder / "data"


def start(data: Path, run: Path, world: int, steps: int = STEPS) -> list[int]:
    options = TrainOptions(
        **dict(data=data, out=run, layers=2, width=32, heads=2, inner=64, dropout=0.1),
        **dict(length=32, tokens=128, micro_batches=2, steps=steps, lr=1e-3, device="cpu"),
        **dict(print_every=1, checkpoint_every=EVERY),
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def work(rank: int) -> int:
        if world > 1:
            told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
            os.environ.update(told | {"RANK": str(rank)})
        with started("cpu") as processes:
            return train(options, processes)

    return [child(lambda rank=rank: work(rank)) for rank in range(world)]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finish(data: Path, run: Path, world: int, steps: int = STEPS) -> list[dict[str, float]]:
    """The figures of all steps, once the run is at its end."""
    if any([waited(number) for number in start(data, run, world, steps)]):
        raise SystemExit(f"a run of {world} processes failed")
    told = [line for line in meter.read(run / "metrics.jsonl") if line["kind"] == "train"]
    return [{name: line[name] for name in COMPARED} for line in told]


def killed(
    data: Path, run: Path, world: int, draws: random.Random, whole: list[dict[str, float]]
) -> Outcome:
    """Starts a run, kills it, goes on with it to its end, and compares."""
    step, moment = draws.randrange(len(whole)), draws.random() * 0.05
    running = start(data, run, world, len(whole))
    begun = time.monotonic()
    while lines(run) < step and time.monotonic() - begun < PATIENCE:
        time.sleep(0.001)
    time.sleep(moment)
    there = lines(run)
    for number in draws.sample(running, len(running)):
        os.kill(number, signal.SIGKILL)
    for number in running:
        waited(number)
    names = sorted(path.name for path in (run / "checkpoints").glob("step-????????"))
    resumed = int(names[-1][5:]) if names else 0
    figures = finish(data, run, world, len(whole))
    assert len(figures) == len(whole), (len(figures), len(whole))
    differences = [
        abs(line[name] - expected[name]) / max(abs(expected[name]), 1e-9)
        for line, expected in zip(figures, whole, strict=True)
        for name in COMPARED
    ]
    return Outcome(there, resumed, max(differences))


def measure(
    points: int, seed: int = 0, steps: int = STEPS, worlds: tuple[int, ...] = (1, 2)
) -> dict[str, dict[str, object]]:
    """Outcomes of so many kills for each number of processes."""
    folder = Path(tempfile.mkdtemp())
    found: dict[str, dict[str, object]] = {}
    try:
        data = make_data(folder)
        for world in worlds:
            whole = finish(data, folder / f"whole-{world}", world, steps)
            draws = random.Random(seed)
            outcomes = []
            for point in range(points):
                run = folder / f"killed-{world}-{point}"
                outcomes.append(killed(data, run, world, draws, whole))
                shutil.rmtree(run)
                told = outcomes[-1]
                print(
                    f"{world} processes, point {point}: killed with {told.step} steps printed, "
                    f"went on from {told.resumed}, largest difference {told.difference:.1e}",
                    flush=True,
                )
            found[f"{world} process" + ("es" if world > 1 else "")] = {
                "steps": steps,
                "points": points,
                "the same to the bit": sum(told.difference == 0 for told in outcomes),
                "largest relative difference": max(told.difference for told in outcomes),
                "kills": [told._asdict() for told in outcomes],
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def passes(found: dict[str, dict[str, object]]) -> bool:
    bounds = {"1 process": 0.0}
    return all(
        told["largest relative difference"] <= bounds.get(name, BOUND)
        for name, told in found.items()
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=20, help="kills of each; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    default = ROOT / "benchmarks" / "results" / "pretrain-kills.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args(arguments)
    found = measure(options.points, options.seed)
    told = {**asdict(environment("cpu")), "seed": options.seed, **found}
    options.out.write_text(json.dumps(told, indent=1) + "\n")
    print(options.out)
    return 0 if passes(found) else 1


if __name__ == "__main__":
    sys.exit(main())
