"""Faults that no budget allows a kernel: serialised wgmma, local memory in a loop, ...

A kernel that has to, for a reason, is excepted in budget.json, where the reason stands:

    "exceptions": [{"gate": ..., "kernel": ..., "forms": [labels], "arch": ..., "why": ...}]
"""

import re
from typing import NamedTuple

from .rows import Row

# ptxas's numbers of what it says where wgmma loses its asynchrony, or a thread its registers.
_SERIALISED = {7508, *range(7510, 7521)}
_SAID = re.compile(r"\(C(\d{4})\)")
_FUNCTION = re.compile(r"in (?:the )?function '([^']+)'")


class Excess(NamedTuple):
    gate: str
    text: str


def warnings(said: str, kernel: str = "") -> list[str]:
    """The lines of ptxas's output that are errors here, but for those about other kernels."""
    found = []
    for line in said.splitlines():
        number, function = _SAID.search(line), _FUNCTION.search(line)
        of_another = kernel and function and function[1] != kernel
        if number and int(number[1]) in _SERIALISED and not of_another:
            found.append(line.strip())
    return list(dict.fromkeys(found))


def excesses(row: Row) -> list[Excess]:
    found = []
    for line in row.compiler_said:
        found.append(Excess("ptxas", f"the compiler said: {line}"))
    if row.local_in_loops:
        text = f"{row.local_in_loops} accesses to local memory in a loop"
        found.append(Excess("local memory", text))
    if row.before_wait:
        text = f"{row.before_wait} accesses to global memory before it waits for earlier kernels"
        found.append(Excess("early access", text))
    if row.late_loads:
        text = f"{row.late_loads} loads are issued only behind the first exponential"
        found.append(Excess("late loads", text))
    if row.multiplies and row.hot is None:
        text = "no path through its main loop multiplies what one turn should"
        found.append(Excess("path", text))
    if row.most_outside is not None and row.hot is not None:
        outside = row.hot.outside
        if outside is None:
            found.append(Excess("path", "no path leads from its main loop to all of its stores"))
        elif outside > row.most_outside:
            text = f"{outside:g} instructions outside the main loop per sum, {row.most_outside:g} "
            found.append(Excess("outside", text + "are allowed"))
    if row.hot is not None and row.hot.waits > row.hot.products:
        text = f"{row.hot.waits} waits for {row.hot.products} products by wgmma"
        found.append(Excess("waits", text))
    # In Triton it is the compiler that chooses, for each loop: there the main loop's are counted.
    if row.source == "cuda" and row.mma_sync and row.mma_async:
        text = f"{row.mma_sync} mma.sync in a kernel with {row.mma_async} wgmma"
        found.append(Excess("mma.sync", text))
    if row.wgmma and row.hot is not None and row.hot.mma_sync:
        text = f"{row.hot.mma_sync} mma.sync in a kernel whose tile is large enough for wgmma"
        found.append(Excess("mma.sync", text))
    return found


def unexcused(budget: dict, row: Row) -> list[Excess]:
    """Those that no exception allows."""
    return [one for one in excesses(row) if _exception(budget, row, one) is None]


def unneeded(budget: dict, rows: list[Row]) -> list[str]:
    """Exceptions for which nothing of what was read has need."""
    used = {id(_exception(budget, row, one)) for row in rows for one in excesses(row)}
    read = {(row.kernel, row.arch) for row in rows}
    return [
        f"{entry['kernel']}, {', '.join(entry['forms'])}, {entry['arch']}: "
        f"an exception of the gate {entry['gate']!r} that nothing needs"
        for entry in budget.get("exceptions", [])
        if (entry["kernel"], entry["arch"]) in read and id(entry) not in used
    ]


def _exception(budget: dict, row: Row, excess: Excess) -> dict | None:
    for entry in budget.get("exceptions", []):
        where = (entry["gate"], entry["kernel"], entry["arch"])
        if where == (excess.gate, row.kernel, row.arch) and row.label in entry["forms"]:
            return entry
    return None
