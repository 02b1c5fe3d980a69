"""A model of attention's speed, made of counts from machine code. It is no measurement.

A turn of a main loop needs cycles of each part of a multiprocessor (hot.bound). How far the warps
of a scheduler overlap these is taken from a closed queueing network of two stations, the products'
(tensor cores, shared memory, L2) and the softmax's (issue, arithmetic). Its customers are the warps
that a scheduler holds, twice as many where a warp overlaps its own phases, as those of
FlashAttention 3 and 4 do. A turn that waits for its own loads has their latency too. One factor for
all kernels is fitted to published speeds. How far the model then is from these is its error, which
`--model` prints.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Console

from ..terminal import OURS, Column, Table, paragraph
from . import hot as hot_paths
from . import hot_budget, peers
from .hot import Hot
from .pipes import MACHINES
from .rows import Row
from .sass import capability

LENGTH, TOKENS, WIDTH = 512, 16384, 2048  # the batches that the published speeds are of
_LATENCY = 500  # cycles of a load from L2 that nothing hides (assumed)
_PER_TILE = 2700  # cycles of a tile beside its turns: FlashAttention 2's forward, 282 of 324 at 512
_FIVE = 5  # products of a backward, as speeds count them
_BANDWIDTH = {80: 1.84e12, 90: 3.08e12}  # bytes/s that copies reach

# TFLOP/s at 512 and at 16,384 tokens a sequence. H100: figures of arXiv 2407.08608 (not causal, 16k
# tokens, width 2048, fp16), as a stored description gives them; A100: FlashAttention 2's own.
PUBLISHED = {
    ("FlashAttention-2", "forward", "D 64", 90): (282, 324),
    ("FlashAttention-2", "forward", "D 128", 90): (309, 370),
    ("FlashAttention-3", "forward", "D 64", 90): (333, 497),
    ("FlashAttention-3", "forward", "D 128", 90): (467, 648),
    ("FlashAttention-2", "backward", "D 64", 90): (198, 291),
    ("FlashAttention-2", "backward", "D 128", 90): (214, 322),
    ("FlashAttention-3", "backward", "D 64", 90): (272, 474),
    ("FlashAttention-2", "forward", "D 64", 80): (None, 183),
}


class Kernel(NamedTuple):
    name: str
    pass_: str  # forward, backward, dq, dkv
    form: str
    arch: str
    warps: int
    blocks: int
    hot: Hot

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.name, self.pass_, self.form, capability(self.arch)


def expected(kernel: Kernel) -> float:
    """Cycles of a turn, before the factor."""
    machine, hot = MACHINES[capability(kernel.arch)], kernel.hot
    scores = hot.rows * hot.columns
    parts = {name: cycles * scores for name, cycles in hot_paths.bound(hot, machine).items()}
    # The softmax's instructions are those that are neither products nor load their operands.
    others = hot.instructions - hot.pipes.get("tensor", 0) - hot.pipes.get("ldsm", 0)
    issue = others / 32 / machine.issue * scores
    softmax = max(issue, *(parts[name] for name in ("fma", "imad", "alu", "mufu")))
    products = max(parts[name] for name in ("tensor", "shared", "L2"))
    own_phases = 2 if _copies_itself(kernel) and kernel.pass_ == "forward" else 1
    waits = _LATENCY if hot.late_loads >= 4 else 0
    each = 4 / kernel.warps
    customers = kernel.blocks * kernel.warps / 4 * own_phases
    share = _share(products * each, softmax * each, customers, waits)
    return max(max(products, softmax) / share, *parts.values())


def _share(a: float, b: float, customers: float, waits: float) -> float:
    """The part of max(a, b)'s rate that customers of two stations reach, each of them waiting
    elsewhere as well: mean value analysis."""

    def rate(count: int) -> float:
        at_a = at_b = result = 0.0
        for present in range(1, count + 1):
            in_a, in_b = a * (1 + at_a), b * (1 + at_b)
            result = present / (waits + in_a + in_b)
            at_a, at_b = result * in_a, result * in_b
        return result

    low, high = math.floor(customers), math.ceil(customers)
    between = rate(high)
    if low != high:
        between = rate(low) + (customers - low) * (between - rate(low))
    return between * max(a, b)


def _copies_itself(kernel: Kernel) -> bool:
    """True if a warpgroup of its own does the copies."""
    return kernel.name in ("FlashAttention-3", "FlashAttention-4")


def _flops(kernel: Kernel) -> int:
    hot = kernel.hot
    return 2 * hot.rows * hot.columns * hot.head_dim * hot.products


def _without_end(kernel: Kernel) -> float:
    """TFLOP/s of long sequences, before the factor."""
    machine = MACHINES[capability(kernel.arch)]
    return _flops(kernel) / expected(kernel) * machine.multiprocessors * machine.gigahertz / 1e3


@functools.cache
def factor() -> float:
    logs = [math.log(PUBLISHED[k.key][1] / _without_end(k)) for k in theirs() if k.key in PUBLISHED]
    return math.exp(sum(logs) / len(logs))


def errors() -> list[float]:
    """Of the published speeds, at both lengths: the model's excess, as a part of it."""
    found = []
    for kernel in theirs():
        short, long = PUBLISHED.get(kernel.key, (None, None))
        if long:
            found.append(_without_end(kernel) * factor() / long - 1)
        if short:
            found.append(speed(kernel) / short - 1)
    return found


def speed(kernel: Kernel, length: int = LENGTH) -> float:
    """TFLOP/s at a length: whole tiles, whole waves, and what a tile costs beside its turns."""
    machine, hot = MACHINES[capability(kernel.arch)], kernel.hot
    own, other = hot.rows, hot.columns
    if kernel.pass_ == "backward":  # a block owns keys, and a turn takes queries
        own, other = other, own
    if kernel.pass_ == "dkv" and kernel.name == "bertfast triton":
        own, other = other, own
    tiles, turns = math.ceil(length / own), math.ceil(length / other)
    blocks = tiles * (TOKENS // length) * (WIDTH // hot.head_dim)
    # Of a backward's time some is spent before and after it: out and dout are read, float32 sums.
    more = 14 * TOKENS * WIDTH / _BANDWIDTH[capability(kernel.arch)]
    more *= kernel.pass_ == "backward"
    waves = math.ceil(blocks / (kernel.blocks * machine.multiprocessors))
    cycles = turns * expected(kernel) / factor() * kernel.blocks + _PER_TILE
    seconds = waves * cycles / (machine.gigahertz * 1e9) + more
    return 2 * hot.products * length * TOKENS * WIDTH / seconds / 1e12


@functools.cache
def theirs() -> list[Kernel]:
    found = []
    for line in peers.read():
        if line["rows"]:
            hot = peers.hot_of(line)
            case = (line["peer"], line["pass"], line["form"], line["arch"])
            found.append(Kernel(*case, int(line["warps"]), int(line["blocks"]), hot))
    return found


def ours(rows: Iterable[Row]) -> list[Kernel]:
    """Our kernels of the peers' forms, where the architecture's rates are known."""
    found = []
    for row in rows:
        named = peers.form_of(hot_budget.key(row))
        if named and row.hot is not None and capability(row.arch) in MACHINES:
            line = hot_budget.line(row)
            case = (f"bertfast {row.source}", *named, row.arch)
            found.append(Kernel(*case, row.threads // 32, line.blocks, row.hot))
    return found


def speeds(rows: Iterable[Row]) -> dict[tuple[str, str, int], dict[str, float]]:
    """By pass, form and architecture: the modelled speed of each library. Our dq and dkv together
    are a backward of five products, whatever they multiply. Of two kernels for one form the faster
    one counts."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    halves: dict[tuple, dict[str, float]] = {}
    for kernel in [*ours(rows), *theirs()]:
        name, pass_, form, arch = kernel.key
        modelled = speed(kernel)
        if pass_ in ("forward", "backward"):
            by_name = found.setdefault((pass_, form, arch), {})
            by_name[name] = max(modelled, by_name.get(name, 0.0))
        else:
            times, time = halves.setdefault((form, arch, name), {}), kernel.hot.products / modelled
            times[pass_] = min(time, times.get(pass_, time))
    for (form, arch, name), times in halves.items():
        if len(times) == 2:
            found.setdefault(("backward", form, arch), {})[name] = _FIVE / sum(times.values())
    return found


def print_model(rows: Iterable[Row], out: Console) -> None:
    table = Table([Column(h, left=h == "") for h in ("", "modelled", "published")])
    for (pass_, form, arch), by_name in speeds(rows).items():
        if any(name.startswith("bertfast") for name in by_name):
            table.add(f"{pass_}, {form}, {MACHINES[arch].name}", style="bold")
            for name, modelled in sorted(by_name.items(), key=lambda item: -item[1]):
                known, _ = PUBLISHED.get((name, pass_, form, arch), (None, None))
                style = OURS if name.startswith("bertfast") else ""
                table.add(f"  {name}", f"{modelled:.0f}", f"{known or '-'}", style=style)
    table.print(out)
    out.print(
        paragraph(
            f"TFLOP/s at {LENGTH} tokens, by a model of the counts: nothing here was measured. "
            f"Fitted to {len(PUBLISHED)} published speeds at {TOKENS:,} tokens by one factor, it "
            f"is {min(errors()):+.0%} to {max(errors()):+.0%} off these and those at {LENGTH}."
        )
    )
