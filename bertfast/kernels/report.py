"""The table of all kernels, for a person."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from .rows import Row

HEADINGS = ["instr/\nelement", "load\nbits", "store\nbits", "stack\nbytes", "shared\nbytes"]
HEADINGS += ["LDS,\nSTS", "MUFU", "MMA"]


def print_table(rows: list[Row], archs: list[str], console: Console) -> None:
    """A table for each kernel: a line for each form and dtype, the worst over the architectures."""
    kernels: dict[tuple[str, str], dict[tuple[str, str], dict[str, Row]]] = {}
    for row in rows:
        forms = kernels.setdefault((row.source, row.kernel), {})
        forms.setdefault((row.label, row.dtypes), {})[row.arch] = row
    for (source, kernel), forms in kernels.items():
        table = Table(title=f"{source}: {kernel}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("form", no_wrap=True)
        table.add_column("dtype", no_wrap=True)
        for name in HEADINGS:
            table.add_column(name, justify="right")
        for arch in archs:
            table.add_column(f"regs\n{arch}", justify="right")
        for (label, dtypes), by_arch in forms.items():
            registers = [str(by_arch[a].registers) if a in by_arch else "-" for a in archs]
            table.add_row(label, dtypes, *_figures(list(by_arch.values())), *registers)
        console.print(table)


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


def _worst(worst, figures: Iterable[float | None]) -> str:
    there = [figure for figure in figures if figure is not None]
    return f"{worst(there):g}" if there else "-"
