"""Other libraries' kernels beside ours: counts from machine code, which are no speeds.

peers.csv, beside this file, was read as `bertfast kernels` reads ours: from the libraries' own
binaries and sources, compiled for the architecture, the turn of the main loop in which every score
counts. Read were FlashAttention 2 and 3, FlashAttention-4 (4.0.0b36), and kernels of ONNX Runtime,
Liger and torch, in November 2026. FlashAttention-3 and 4 copy by TMA, whose bytes are those of the
tiles. Of row kernels, only the instructions for each element are kept.
"""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ..terminal import OURS, Column, Table, paragraph
from .hot import Hot
from .hot_budget import Key, Line, Lines
from .sass import capability

PATH = Path(__file__).parent / "peers.csv"
HEADINGS = ("", "arch", "instr", "shared", "L2", "registers", "blocks")
NOTE = (
    "Counts from machine code, not speeds. instr: instructions per score on the path of a block in "
    "which every score counts; of row kernels per element, ours as in the budget. shared, L2: "
    "bytes per score. blocks: that fit on a multiprocessor. "
    "Our backward is two kernels, whose figures are added up here: seven products, the others' "
    "five."
)
PASSES = {"forward": "forward", "dq": "backward", "dkv": "backward"}
# The names of our kernels, by what they compute.
_KERNEL = re.compile(r"attention_(?:fwd|forward|bwd|backward)_?(dq|dkv)?_?(?:bulk_|double_)?kernel")
# Of Triton's forms, the one that has no mask and no short sequences.
_TRITON_FORM = re.compile(r"\w+, packed, (D \d+), up to 512(, dropout)?")
_CUDA_FORM = re.compile(r"(D \d+), \d+ x \d+(, dropout)?")


# Of row kernels: op, pass and form -> our kernel and its form, in Triton, in bfloat16.
_ROWS = {
    ("layer_norm", "forward", ""): ("layer_norm_fwd_kernel", "768, plain"),
    ("layer_norm", "forward", "with a residual"): ("layer_norm_fwd_kernel", "768, inference"),
    ("layer_norm", "backward", ""): ("layer_norm_bwd_kernel", "768"),
    ("bias_gelu", "forward", "bf16"): ("bias_gelu_fwd_kernel", "3072"),
}


class Counts(NamedTuple):
    name: str
    op: str
    pass_: str  # forward or backward
    form: str  # "D 64, dropout"
    arch: str
    instructions: float  # per score, or per element of a row
    shared_bytes: float | None = None
    cache_bytes: float | None = None
    registers: int | None = None
    blocks: int | None = None

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("bertfast")

    def cells(self) -> list[str]:
        return [
            f"{self.instructions:.1f}",
            *("-" if b is None else f"{b:.1f}" for b in (self.shared_bytes, self.cache_bytes)),
            *("-" if n is None else str(n) for n in (self.registers, self.blocks)),
        ]


def read() -> list[dict[str, str]]:
    """The file's lines."""
    with PATH.open(newline="") as file:
        return list(csv.DictReader(file))


def theirs() -> list[Counts]:
    found = []
    for line in read():
        case = (line["peer"], line["op"], line["pass"], line["form"], line["arch"])
        one = Counts(*case, float(line["instructions"]))
        if line["rows"]:  # a loop's counts, not only its instructions
            one = one._replace(
                shared_bytes=float(line["shared_bytes"]),
                cache_bytes=float(line["cache_bytes"]),
                registers=int(line["registers"]),
                blocks=int(line["blocks"]),
            )
        found.append(one)
    return found


def hot_of(line: dict[str, str]) -> Hot:
    """A line's counts as those of a hot path of ours."""
    rows, columns, head_dim, products = (
        int(line[name]) for name in ("rows", "columns", "head_dim", "products")
    )
    return Hot(
        float(line["instructions"]),
        float(line["shared_bytes"]),
        float(line["cache_bytes"]),
        **dict(loads=0, late_loads=0, waits=0, mma_sync=0, products=products),
        **dict(rows=rows, columns=columns, head_dim=head_dim),
        pipes={
            name: float(line[name]) for name in ("fma", "imad", "alu", "mufu", "tensor", "ldsm")
        },
        multiply_adds={line["multiplies_by"]: products * head_dim},
    )


def form_of(key: Key) -> tuple[str, str] | None:
    """A form of ours in the peers' words: ("dq", "D 64, dropout"). None: peers have no such
    form."""
    source, kernel, label, dtypes, _ = key
    which = _KERNEL.fullmatch(kernel)
    form = (_TRITON_FORM if source == "triton" else _CUDA_FORM).fullmatch(label)
    if which is None or form is None or dtypes != "bfloat16":
        return None
    return which[1] or "forward", form[1] + (form[2] or "")


def ours(lines: Lines) -> list[Counts]:
    """Of our hot paths those that peers have too, of two kernels for one form the shorter one. dq
    and dkv are added up."""
    found: dict[tuple[str, str, str, str], dict[str, Line]] = {}
    for key, line in lines.items():
        named = form_of(key)
        if named is not None:
            case = (f"bertfast {key[0]}", PASSES[named[0]], named[1], key[-1])
            by_pass = found.setdefault(case, {})
            known = by_pass.setdefault(named[0], line)
            by_pass[named[0]] = min(known, line, key=lambda one: one.instructions)
    result = []
    for (name, pass_, form, arch), by_pass in found.items():
        parts = list(by_pass.values())
        if len(parts) == (1 if pass_ == "forward" else 2):
            shared = [part.shared_bytes for part in parts if part.shared_bytes is not None]
            result.append(
                Counts(
                    *(name, "attention", pass_, form, arch),
                    sum(part.instructions for part in parts),
                    sum(shared) if len(shared) == len(parts) else None,
                    sum(part.cache_bytes for part in parts),
                    max(part.registers for part in parts),
                    min(part.blocks for part in parts),
                )
            )
    return result


def our_rows(budget: dict) -> list[Counts]:
    """Of our row kernels those that peers have too: the most on any architecture."""
    found = []
    for (op, pass_, form), (kernel, label) in _ROWS.items():
        cell = budget["kernels"]["triton"][kernel]["forms"][label]["bfloat16"]
        instructions = cell["instructions"] if isinstance(cell, dict) else cell
        found.append(Counts("bertfast triton", op, pass_, form, "", instructions))
    return found


def groups(counts: Iterable[Counts]) -> dict[str, list[Counts]]:
    """By op, pass and form those that somebody else has too, for the architectures that both were
    compiled for; the fewest instructions first."""
    found: dict[str, list[Counts]] = {}
    for one in counts:
        found.setdefault(", ".join(filter(None, (one.op, one.pass_, one.form))), []).append(one)
    result = {}
    for name, group in found.items():
        archs = {capability(one.arch) for one in group if not one.is_ours and one.arch}
        kept = [one for one in group if not one.arch or capability(one.arch) in archs]
        if any(not one.is_ours for one in kept):
            order = sorted(kept, key=lambda one: (one.arch[:5], one.instructions))
            result[name] = order
    return result


def print_peers(lines: Lines, budget: dict, out: Console) -> None:
    """lines: our hot paths, as they were read. Of our row kernels it takes the budget."""
    table = Table([Column(h, left=h in ("", "arch")) for h in HEADINGS])
    for name, group in groups([*ours(lines), *our_rows(budget), *theirs()]).items():
        table.add(name, style="bold")
        for one in group:
            style = OURS if one.is_ours else ""
            table.add(f"  {one.name}", one.arch or "-", *one.cells(), style=style)
    table.print(out)
    out.print(paragraph(NOTE))


def markdown(budget: dict, lines: Lines) -> str:
    """The README's table: attention at BERT's head dimension on Hopper, and row kernels."""
    text = ["|  | instructions | shared bytes | L2 bytes | registers | blocks |"]
    text.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, group in groups([*ours(lines), *our_rows(budget), *theirs()]).items():
        if name.endswith(("D 64", "D 64, dropout")) or not name.startswith("attention"):
            for one in group:
                if not one.arch or capability(one.arch) == 90:
                    text.append(f"| {name}: {one.name} | {' | '.join(one.cells())} |")
    return "\n".join(text)
