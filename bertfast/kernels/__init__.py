"""`bertfast kernels`: what the compiler made of every kernel, against a committed budget.

Reads the machine code of the Triton kernels (compiled ahead of time) and of the CUDA kernels (what
`bertfast._cuda` carries) for each architecture. No GPU is needed.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rich.console import Console

from . import budget as budgets
from . import cuda_modules, triton_aot
from .report import print_table
from .rows import Row, aot_modules
from .sass import MissingTool

WIDTH = 180  # of the tables, also where the terminal is narrower
DEFAULT_ARCHS = ["sm_80", "sm_90a", "sm_100", "sm_120"]


@dataclass
class Reading:
    """All that could be read on this machine."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # what should have compiled, and didn't
    complete_sources: list[str] = field(default_factory=list)


def read(archs: list[str], op: str | None = None) -> Reading:
    """The kernels of one op or of all, compiled for each architecture."""
    modules = [module.__name__ for name, module in aot_modules().items() if op in (None, name)]
    readers: dict[str, Callable[[str], tuple[list[Row], list[str]]]] = {
        "triton": lambda arch: triton_aot.read(arch, modules),
        "cuda": lambda arch: (cuda_modules.read(arch, op), []),
    }
    reading = Reading()
    # Two at a time; each works in a process of its own.
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            (source, arch): pool.submit(reader, arch)
            for source, reader in readers.items()
            for arch in archs
        }
    for source in readers:
        reasons: dict[str, list[str]] = {}
        for arch in archs:
            try:
                rows, failures = jobs[source, arch].result()
            except (triton_aot.LeftOut, cuda_modules.LeftOut, MissingTool) as reason:
                reasons.setdefault(str(reason), []).append(arch)
            except RuntimeError as error:
                reading.failures.append(f"{source} {arch}: {error}")
            else:
                reading.rows += rows
                reading.failures += failures
                if rows and source not in reading.complete_sources:
                    reading.complete_sources.append(source)
        reading.left_out += [f"{source} {', '.join(on)}: {why}" for why, on in reasons.items()]
    if op is not None or reading.failures:  # parts are missing: nothing can be called stale
        reading.complete_sources = []
    reading.rows.sort(key=lambda row: (row.source, row.kernel, _natural(row.label), row.dtypes))
    return reading


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers in a text by their value."""
    parts = re.findall(r"\d+|\D+", text)
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def compilers() -> dict[str, str | None]:
    return {"triton": triton_aot.version(), "cuda": cuda_modules.version()}


def check(reading: Reading, budget: dict, present: dict[str, str | None]) -> list[str]:
    """One line for each excess, in the words of the report."""
    lines = [f"FAIL {failure}" for failure in reading.failures]
    for source in dict.fromkeys(row.source for row in reading.rows):
        rows = [row for row in reading.rows if row.source == source]
        same = present[source] == budget.get("measured_with", {}).get(source)
        allowance = 0.0 if same else budget.get("allowance_for_other_compilers", 0.0)
        for verdict in budgets.check(budget, rows, allowance):
            row = verdict.row
            assert row is not None
            lines.append(
                f"FAIL {source} {row.kernel}, {row.label}, {row.dtypes}, {row.arch}: {verdict.text}"
            )
    for verdict in budgets.stale(budget, reading.rows, reading.complete_sources):
        lines.append(f"FAIL {verdict.text}")
    return lines


def kernels(
    archs: list[str] | None = None,
    as_json: bool = False,
    op: str | None = None,
    update_budget: bool = False,
) -> int:
    """Prints the report; 0 if nothing that could be read exceeds the budget."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, WIDTH)
    known = aot_modules()
    if op is not None and op not in known:
        console.print(f"op must be one of {', '.join(known)}, got {op}", style="red")
        return 2
    chosen = list(dict.fromkeys(archs or DEFAULT_ARCHS))
    reading, present, budget = read(chosen, op), compilers(), budgets.load()
    changes: list[str] = []
    if update_budget:
        budget, changes = budgets.update(budget, reading.rows, reading.complete_sources)
        with_ = budget.get("measured_with", {})
        read_sources = {row.source for row in reading.rows}
        budget["measured_with"] = with_ | {s: v for s, v in present.items() if s in read_sources}
        budgets.write(budget)
    failures = check(reading, budget, present)
    if as_json:
        report = {
            "compilers": present,
            "rows": [row.as_dict() for row in reading.rows],
            "left_out": reading.left_out,
            "failures": failures,
            "budget_changes": changes,
        }
        print(json.dumps(report, indent=1))
        return int(bool(failures))
    print_table(reading.rows, chosen, console)
    for source, version in present.items():
        if any(row.source == source for row in reading.rows):
            was = budget.get("measured_with", {}).get(source)
            other = "" if version == was else f" (the budget was measured with {was})"
            compiler = {"triton": "Triton", "cuda": "nvcc"}[source]
            console.print(f"{source}: compiled by {compiler} {version}{other}", highlight=False)
    for line in changes:
        console.print(f"budget: {line}", highlight=False, markup=False)
    for line in reading.left_out:
        console.print(f"left out: {line}", style="yellow", highlight=False, markup=False)
    for line in failures:
        console.print(line, style="red", highlight=False, markup=False)
    if not reading.rows:
        console.print("nothing could be read on this machine", style="yellow")
    elif not failures:
        forms = len({row.form for row in reading.rows})
        text = f"PASS {forms} kernels in {len(reading.rows)} compilations are within the budget"
        console.print(text, style="green", highlight=False)
    return int(bool(failures))
