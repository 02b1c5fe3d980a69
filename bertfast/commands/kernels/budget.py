"""The committed limits of every kernel, and what exceeds them.

budget.json, beside this file: source -> kernel -> rules and forms. A form (a
configuration) has a cell for each dtype: the most instructions per element on any architecture
(null where a kernel has no such figure), or an object with that and with what the form is allowed
beyond its kernel's rules.

    stack                       most bytes a thread may spill
    load_bits, store_bits       least width of a load and a store of row data
    instructions                for each element, at most
    tensor_cores                whether there must be tensor-core instructions
    blocks_per_multiprocessor   that registers and shared memory must leave room for; null: any

A kernel or a form that the file doesn't have fails, so that a new one is entered. What holds
whatever the budget is in gates.py, the figures of hot paths in hot_budget.py.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import gates, hot_budget
from .occupancy import blocks_per_multiprocessor
from .rows import Row

PATH = Path(__file__).parent / "budget.json"
HOT_PATHS = "hot_paths"  # of a budget: the lines of the file of this name beside it
RULES = {
    "stack": 0,
    "load_bits": 128,
    "store_bits": 128,
    "tensor_cores": False,
    "blocks_per_multiprocessor": None,
}
MATRIX_KERNELS = ("attention", "linear")  # how the names of kernels start that need tensor cores


@dataclass(frozen=True)
class Verdict:
    row: Row | None
    text: str  # what was exceeded, with the figure and the limit


def load(path: Path = PATH) -> dict:
    """budget.json and, as its part, the hot paths."""
    hot_paths = path.with_name(f"{HOT_PATHS}.csv")
    return json.loads(path.read_text()) | {HOT_PATHS: hot_budget.load(hot_paths)}


def default_rules(kernel: str) -> dict:
    return RULES | {"tensor_cores": kernel.startswith(MATRIX_KERNELS)}


def limits(budget: dict, row: Row) -> dict | None:
    """The rules and the limit that hold for a row; None if the file doesn't know it."""
    entry = budget["kernels"].get(row.source, {}).get(row.kernel)
    if entry is None:
        return None
    cells = entry["forms"].get(row.label, {})
    if row.dtypes not in cells:
        return None
    cell = cells[row.dtypes]
    if not isinstance(cell, dict):
        cell = {"instructions": cell}
    return default_rules(row.kernel) | entry.get("rules", {}) | cell


def check(budget: dict, rows: Iterable[Row], allowance: float = 0.0) -> list[Verdict]:
    """The limits that the rows exceed. allowance: the part by which instructions may, under another
    compiler than the one that the budget was measured with."""
    verdicts = []

    def fail(row: Row, text: str) -> None:
        verdicts.append(Verdict(row, text))

    for row in rows:
        limit = limits(budget, row)
        if limit is None:
            fail(row, "no budget line; enter it with --update-budget")
            continue
        if row.stack > limit["stack"]:
            fail(row, f"stack {row.stack} bytes, budget {limit['stack']}")
        for what in ("load_bits", "store_bits"):
            bits = getattr(row, what)
            if bits is not None and bits < limit[what]:
                name = what.partition("_")[0]
                fail(row, f"{bits}-bit {name}s of row data, budget {limit[what]}")
        most, is_ = limit["instructions"], row.instructions_per_element
        if most is not None and is_ is not None and is_ > most * (1 + allowance):
            fail(row, f"{is_} instructions per element, budget {most}")
        # Tensor cores would multiply float32 as TF32.
        if limit["tensor_cores"] and row.tensor_core == 0 and row.dtypes != "float32":
            fail(row, "no tensor-core instruction")
        blocks = limit["blocks_per_multiprocessor"]
        if blocks is not None and blocks_per_multiprocessor(row) < blocks:
            fit = blocks_per_multiprocessor(row)
            fail(row, f"{fit} blocks fit on a multiprocessor, budget {blocks}")
        for text in hot_budget.check(budget.get(HOT_PATHS, {}), row, allowance):
            fail(row, text)
        for excess in gates.unexcused(budget, row):
            fail(row, excess.text)
    return verdicts


def stale(budget: dict, rows: Iterable[Row], sources: Iterable[str]) -> list[Verdict]:
    """Budget lines without a kernel, of sources that were read completely."""
    rows, sources = list(rows), list(sources)
    seen = {row.form for row in rows}
    lines = hot_budget.stale(budget.get(HOT_PATHS, {}), rows, sources)
    read = [row for row in rows if row.source in sources]
    texts = [*lines, *gates.unneeded(budget, read)]
    return [Verdict(None, text) for text in texts] + [
        Verdict(None, f"{source} {kernel}, {label}, {dtypes}: a budget line without such a kernel")
        for source in sources
        for kernel, entry in budget["kernels"].get(source, {}).items()
        for label, cells in entry["forms"].items()
        for dtypes in cells
        if (source, kernel, label, dtypes) not in seen
    ]


def _cell(worst: list[Row], rules: dict) -> float | dict | None:
    """The figures of a form, as the file has them: over all architectures the worst."""
    figures = [row.instructions_per_element for row in worst]
    known = [figure for figure in figures if figure is not None]
    most = max(known) if len(known) == len(figures) else None
    beyond: dict = {}
    if (stack := max(row.stack for row in worst)) > rules["stack"]:
        beyond["stack"] = stack
    for what in ("load_bits", "store_bits"):
        measured = [getattr(row, what) for row in worst if getattr(row, what) is not None]
        if measured and min(measured) < rules[what]:
            beyond[what] = min(measured)
    return {"instructions": most} | beyond if beyond else most


def update(
    budget: dict, rows: list[Row], complete_sources: Iterable[str]
) -> tuple[dict, list[str]]:
    """The budget with every limit as measured, and a line for each change. Rules stay."""
    kernels = json.loads(json.dumps(budget["kernels"]))
    complete_sources = list(complete_sources)
    old_paths = budget.get(HOT_PATHS, {})
    hot_paths, changes = hot_budget.update(old_paths, rows, complete_sources)
    for line in stale({"kernels": budget["kernels"]}, rows, complete_sources):
        changes.append(f"gone     {line.text.rpartition(':')[0]}")
    for source in complete_sources:
        seen = {row.form[1:] for row in rows if row.source == source}
        for kernel, entry in list(kernels.get(source, {}).items()):
            for label, cells in list(entry["forms"].items()):
                kept = {d: cell for d, cell in cells.items() if (kernel, label, d) in seen}
                entry["forms"][label] = kept
                if not kept:
                    del entry["forms"][label]
            if not entry["forms"]:
                del kernels[source][kernel]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.form, []).append(row)
    for (source, kernel, label, dtypes), group in groups.items():
        entry = kernels.setdefault(source, {}).setdefault(kernel, {"forms": {}})
        rules = default_rules(kernel) | entry.get("rules", {})
        old, new = limits(budget, group[0]), _cell(group, rules)
        entry["forms"].setdefault(label, {})[dtypes] = new
        name = f"{source} {kernel}, {label}, {dtypes}"
        if old is None:
            changes.append(f"new      {name}: {json.dumps(new)}")
            continue
        new_limits = rules | (new if isinstance(new, dict) else {"instructions": new})
        for what, value in new_limits.items():
            if value != old[what]:
                direction = "looser  " if _looser(what, old[what], value) else "tighter "
                changes.append(f"{direction} {name}: {what} {old[what]} -> {value}")
    return budget | {"kernels": kernels, HOT_PATHS: hot_paths}, changes


def _looser(what: str, old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return new is None
    return new < old if what.endswith("_bits") else new > old


def write(budget: dict, path: Path = PATH) -> None:
    """As JSON with one line for each form or exception; the hot paths into the file beside it."""
    budget = dict(budget)
    hot_budget.write(budget.pop(HOT_PATHS, {}), path.with_name(f"{HOT_PATHS}.csv"))
    lines = ["{"]
    for key, value in budget.items():
        if key == "exceptions":
            entries = [f"    {json.dumps(entry)}" for entry in value]
            lines += ['  "exceptions": [', ",\n".join(entries), "  ],"]
        elif key != "kernels":
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)},")
    lines.append('  "kernels": {')
    for source, entries in budget["kernels"].items():
        lines.append(f"    {json.dumps(source)}: {{")
        for kernel, entry in entries.items():
            lines.append(f"      {json.dumps(kernel)}: {{")
            if "rules" in entry:
                lines.append(f'        "rules": {json.dumps(entry["rules"])},')
            lines.append('        "forms": {')
            forms = [
                f"          {json.dumps(k)}: {json.dumps(v)}" for k, v in entry["forms"].items()
            ]
            lines += [",\n".join(forms), "        }", "      },"]
        lines[-1] = lines[-1].rstrip(",")
        lines.append("    },")
    if budget["kernels"]:
        lines[-1] = lines[-1].rstrip(",")
    lines += ["  }", "}"]
    text = "\n".join(lines) + "\n"
    assert json.loads(text) == budget
    path.write_text(text)
