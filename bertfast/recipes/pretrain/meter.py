"""A run's figures: printed, in TensorBoard, and in metrics.jsonl, a line each.

Losses and accuracies are means since the line before, over all processes. A checkpoint holds the
sums that they are made of, so a run that goes on prints what it would have printed.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .model import Sums
from .packed import PackedBatch
from .parallel import Processes

# Sums over micro-batches, by name.
SUMMED = ("mlm", "nsp", "nsp_right", "mlm_right")
COUNTED = ("labels", "sequences", "sampled", "tokens", "batches")


class Meter:
    """One process's sums; `figures` adds up those of all."""

    def __init__(self, processes: Processes, budget: int, nsp: bool) -> None:
        """budget: tokens that a micro-batch has room for."""
        self.processes, self.budget, self.nsp = processes, budget, nsp
        self.sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=processes.device)
        self.counts = dict.fromkeys(COUNTED, 0)
        self.waited = 0.0
        self.begun, self.tokens_timed, self.steps_timed = time.perf_counter(), 0, 0

    def add(self, batch: PackedBatch, sums: Sums, sample: int) -> None:
        self.sums += torch.stack([part.detach().to(torch.float64) for part in sums])
        labels = len(batch.labels)
        new = (labels, batch.sequences, min(labels, sample), batch.tokens, 1)
        for name, value in zip(COUNTED, new, strict=True):
            self.counts[name] += value
        self.tokens_timed += batch.tokens

    def pause(self, seconds: float) -> None:
        """Leaves out time that wasn't training's."""
        self.begun += seconds

    def state(self) -> dict[str, float]:
        """The sums of all processes, for a checkpoint; called by all."""
        values = [*self.sums.tolist(), *self.counts.values()]
        return dict(zip((*SUMMED, *COUNTED), self.processes.add_up(values), strict=True))

    def restore(self, state: dict[str, float]) -> None:
        if self.processes.first:
            found = torch.tensor([state[name] for name in SUMMED], dtype=torch.float64)
            self.sums += found.to(self.sums.device)
            self.counts = {name: int(state[name]) for name in COUNTED}

    def figures(self) -> dict[str, float]:
        """Since the call before; called by all."""
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(self.processes.device)
        passed = time.perf_counter() - self.begun
        values = [*self.sums.tolist(), *self.counts.values(), self.tokens_timed, self.waited]
        names = (*SUMMED, *COUNTED, "tokens_timed", "waited")
        total = dict(zip(names, self.processes.add_up(values), strict=True))
        mlm = total["mlm"] / max(1, total["labels"])
        nsp = total["nsp"] / max(1, total["sequences"])
        found = {"loss": mlm + nsp, "mlm_loss": mlm}
        found["mlm_accuracy"] = total["mlm_right"] / max(1, total["sampled"])
        if self.nsp:
            found["nsp_loss"] = nsp
            found["nsp_accuracy"] = total["nsp_right"] / max(1, total["sequences"])
        found["tokens_per_second"] = total["tokens_timed"] / passed
        # Packed batches have no padding: all that is computed is of a token.
        found["useful_tokens"] = 1.0
        found["budget_used"] = total["tokens"] / max(1, total["batches"] * self.budget)
        found["input_wait"] = total["waited"] / passed / self.processes.world
        found["seconds_per_step"] = passed / max(1, self.steps_timed)
        found["peak_memory_bytes"] = peak_memory(self.processes.device)
        self.sums.zero_()
        self.counts = dict.fromkeys(COUNTED, 0)
        self.waited, self.tokens_timed, self.steps_timed = 0.0, 0, 0
        self.begun = time.perf_counter()
        return found


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: on a GPU of torch's tensors, elsewhere of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def line(step: int, steps: int, figures: dict[str, float]) -> str:
    """The figures as they are printed."""
    parts = [f"step {step}/{steps}", f"loss {figures['loss']:.4f}"]
    parts.append(f"MLM {figures['mlm_loss']:.4f} ({100 * figures['mlm_accuracy']:.1f} % right)")
    if "nsp_loss" in figures:
        parts.append(f"NSP {figures['nsp_loss']:.4f} ({100 * figures['nsp_accuracy']:.1f} %)")
    parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    parts.append(
        f"useful {figures['useful_tokens']:.2f}, of the budget {figures['budget_used']:.2f}"
    )
    parts.append(f"input wait {100 * figures['input_wait']:.1f} %")
    parts.append(f"lr {figures['lr']:.2e}")
    parts.append(f"gradient {figures['gradient_norm']:.3f}")
    parts.append(f"{figures['peak_memory_bytes'] / 1e9:.2f} GB")
    parts.append(f"left {duration((steps - step) * figures['seconds_per_step'])}")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class Log:
    """The lines of figures: on stdout, in metrics.jsonl and in TensorBoard. The first process has
    one."""

    def __init__(self, run: Path, step: int, steps: int) -> None:
        """step: the last one that is done; lines and events of later ones, which will be done
        again, go."""
        self.path, self.steps = run / "metrics.jsonl", steps
        keep_until(self.path, step, steps)
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        except ImportError:
            print("no TensorBoard: pip install bertfast[train] brings it", file=sys.stderr)
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def done(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, figures: dict[str, float], text: str, kind: str = "train") -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        self.say(text)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()


def keep_until(path: Path, step: int, steps: int) -> None:
    """Cuts off a file's lines of later steps, and one that was half written. The evaluation at the
    run's end goes too, as it is made again."""
    if not path.exists():
        return
    kept = [text for text in path.read_text().splitlines() if _comes_before(text, step, steps)]
    aside = path.with_suffix(".writing")
    aside.write_text("".join(text + "\n" for text in kept))
    os.replace(aside, path)


def _comes_before(text: str, step: int, steps: int) -> bool:
    try:
        told = json.loads(text)
        return told["step"] <= step and (told["kind"] == "train" or told["step"] < steps)
    except (ValueError, KeyError, TypeError):
        return False


def read(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(text) for text in path.read_text().splitlines()]
