"""The tables of kernels, for a person: a summary, and every kernel in every form."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ..terminal import BAD, GOOD, HEAD, Column, Table, paragraph
from . import budget as budgets
from . import hot_budget
from .rows import Row

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Summary:
    """A line for each op, source and architecture, printed as soon as it is known."""

    def __init__(self, out: Console, ops: Sequence[str], archs: Sequence[str]) -> None:
        self.out = out
        self.table = Table(
            [
                Column("op", left=True, width=max(map(len, (*ops, "op")))),
                Column("source", left=True),
                Column("arch", left=True, width=max(map(len, archs))),
                Column("kernels"),
                Column("regs"),
                Column("spills"),
                Column("per element", width=14),
                Column("verdict", left=True),
            ]
        )
        self.begun = False

    def add(self, rows: list[Row], budget: dict, allowance: float) -> None:
        """The rows are those of one op and source, for one architecture."""
        if not self.begun:
            self.begun = True
            self.table.fit()
            for line, style in self.table.head():
                self.out.print(Text(line, style=style))
        over = len({v.row.form for v in budgets.check(budget, rows, allowance) if v.row})
        first = rows[0]
        cells = (
            first.op,
            first.source,
            first.arch,
            str(len(rows)),
            str(max(row.registers for row in rows)),
            str(sum(row.stack > 0 for row in rows)),
            _nearest(rows, budget),
            f"{over} over" if over else "within",
        )
        self.out.print(Text(self.table.line(cells), style=BAD if over else GOOD))


NOTE = (
    "regs: the most registers of a thread. spills: kernels that keep a thread's values in "
    "memory. per element: the instructions of the kernel that is nearest to its budget, and that "
    "budget; in attention per score, on the path of a block in which every score counts. --all "
    "shows every kernel, --peers the counts of other libraries, --model speeds by a model."
)


def _nearest(rows: list[Row], budget: dict) -> str:
    """Instructions per element and the budget, where the part taken is the largest."""
    shares = []
    hot_paths = budget.get(budgets.HOT_PATHS, {})
    for row in rows:
        limit: Any = budgets.limits(budget, row)
        is_, most = row.instructions_per_element, limit and limit["instructions"]
        if row.hot is not None and hot_budget.key(row) in hot_paths:
            is_, most = row.hot.instructions, hot_paths[hot_budget.key(row)].instructions
        if is_ is not None and most is not None:
            shares.append((is_ / most, is_, f"{is_:.2f} of {most:.2f}"))
    return max(shares)[-1] if shares else "-"


def print_every(rows: list[Row], archs: Sequence[str], out: Console) -> None:
    """A table for each kernel: a line for each form and dtype, the worst over the architectures."""
    kernels: dict[tuple[str, str], dict[str, dict[str, dict[str, Row]]]] = {}
    for row in rows:
        forms = kernels.setdefault((row.source, row.kernel), {})
        forms.setdefault(row.label, {}).setdefault(row.dtypes, {})[row.arch] = row
    here = [arch for arch in archs if any(row.arch == arch for row in rows)]
    for (source, kernel), forms in kernels.items():
        table = Table([Column(h, left=h in ("", "registers")) for h in HEADINGS])
        table.title = f"{source}: {kernel}"
        for label, by_dtype in forms.items():
            table.add(label, style=HEAD)
            for dtypes, by_arch in by_dtype.items():
                registers = (str(by_arch[a].registers) if a in by_arch else "-" for a in here)
                name = ">".join(SHORT.get(part, part) for part in dtypes.split("->"))
                table.add(f" {name}", *_figures(list(by_arch.values())), " ".join(registers))
        table.print(out)
        _print_hot_paths(forms, out)
    out.print(LEGEND)
    out.print(paragraph(f"registers: a thread's, on {', '.join(here)}"))


def _print_hot_paths(forms: dict[str, dict[str, dict[str, Row]]], out: Console) -> None:
    """A line for each form, dtype and architecture."""
    table = Table([Column(h, left=h in ("", "bound")) for h in HOT_HEADINGS])
    for label, by_dtype in forms.items():
        lines = [
            (f" {SHORT[dtypes]} {arch}", hot_budget.line(row))
            for dtypes, by_arch in by_dtype.items()
            for arch, row in by_arch.items()
            if row.hot is not None
        ]
        if lines:
            table.add(label, style=HEAD)
        for name, line in lines:
            table.add(name, *_hot_figures(line))
    if table.rows:
        table.title = "  its hot path, per score"
        table.print(out)


def _hot_figures(line: hot_budget.Line) -> list[str]:
    return [
        f"{line.instructions:.2f}",
        "-" if line.outside is None else f"{line.outside:.1f}",
        "-" if line.shared_bytes is None else f"{line.shared_bytes:.1f}",
        f"{line.cache_bytes:.2f}",
        str(line.blocks),
        f"{line.loads - line.late_loads}/{line.loads}",
        f"{line.waits}/{line.products}" if line.waits else "-",
        line.bound or "-",
    ]


HEADINGS = ("", "instr", "load", "store", "stack", "shared", "LDS", "MUFU", "MMA", "registers")
LEGEND = """\
instr: instructions per element, in attention per score
load, store: bits of the narrowest access to row data
stack: bytes that a thread spills; shared: bytes of a block
LDS: accesses to shared memory; MUFU: special functions; MMA: tensor cores
Of a hot path, the turn of a main loop in which every score counts:
after: instructions outside that loop, where a score is a sum of a product
shared, L2: bytes; blocks: that fit on a multiprocessor
early: loads that are asynchronous or issued a product before they are used
waits: for wgmma, of so many products; bound: what the counts ask most of"""
HOT_HEADINGS = ("", "instr", "after", "shared", "L2", "blocks", "early", "waits", "bound")


def _figures(rows: list[Row]) -> list[str]:
    return [
        _worst(max, (row.instructions_per_element for row in rows)),
        _worst(min, (row.load_bits for row in rows)),
        _worst(min, (row.store_bits for row in rows)),
        str(max(row.stack for row in rows)),
        str(max(row.shared for row in rows)),
        str(max(row.shared_accesses for row in rows)),
        str(max(row.mufu for row in rows)),
        str(min(row.tensor_core for row in rows)),
    ]


def _worst(worst: Callable, figures: Iterable[float | None]) -> str:
    there = [figure for figure in figures if figure is not None]
    return f"{worst(there):g}" if there else "-"
