"""The committed figures of hot paths, and what exceeds them.

hot_paths.csv, beside this file, has a line for each form of a kernel with tensor cores on each
architecture, as `--update-budget` read it. registers and bound, the part of a multiprocessor that
the counts ask most of (pipes.py), are shown and are no limits.
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import TypeAlias

from . import hot as hot_paths
from .occupancy import blocks_per_multiprocessor
from .pipes import MACHINES
from .rows import Row
from .sass import capability

Key: TypeAlias = tuple[str, str, str, str, str]
KEY = ("source", "kernel", "label", "dtypes", "arch")


@dataclass(frozen=True)
class Line:
    instructions: float  # per score, as bytes are
    shared_bytes: float | None  # through shared memory
    cache_bytes: float  # from the second-level cache, or to it
    registers: int  # of a thread
    blocks: int  # that fit on a multiprocessor
    loads: int  # of a turn
    late_loads: int  # those that the turn waits for
    waits: int  # for wgmma, in a turn
    products: int
    bound: str
    outside: float | None  # instructions outside the main loop, per sum of a product


_PER_SCORE = {
    "instructions": "instructions per score",
    "shared_bytes": "bytes of shared memory per score",
    "cache_bytes": "bytes of L2 per score",
    "outside": "instructions outside the main loop per sum",
}
_PER_TURN = {
    "late_loads": "loads that a turn waits for",
    "waits": "waits for wgmma in a turn",
}
Lines: TypeAlias = dict[Key, Line]


def key(row: Row) -> Key:
    return *row.form, row.arch


def line(row: Row) -> Line:
    """Of a row that has a hot path."""
    hot = row.hot
    assert hot is not None
    return Line(
        hot.instructions,
        hot.shared_bytes,
        hot.cache_bytes,
        row.registers,
        blocks_per_multiprocessor(row),
        hot.loads,
        hot.late_loads,
        hot.waits,
        hot.products,
        bound(row),
        hot.outside,
    )


def bound(row: Row) -> str:
    """ "" where the rates of the architecture aren't known."""
    machine = MACHINES.get(capability(row.arch))
    if machine is None or row.hot is None:
        return ""
    cycles = hot_paths.bound(row.hot, machine)
    return max(cycles, key=cycles.__getitem__)


def lines_of(rows: Iterable[Row]) -> Lines:
    return {key(row): line(row) for row in rows if row.hot is not None}


def check(lines: Lines, row: Row, allowance: float) -> Iterator[str]:
    """Lines for what a row exceeds. An allowance is for another compiler's instructions and bytes:
    its blocks, loads and waits aren't looked at then."""
    if row.hot is None or row.arch not in {arch for *_, arch in lines}:
        return
    limit, now = lines.get(key(row)), asdict(line(row))
    if limit is None:
        yield "no line in hot_paths.csv; enter it with --update-budget"
        return
    for name, words in (_PER_SCORE if allowance else _PER_SCORE | _PER_TURN).items():
        is_, most = now[name], getattr(limit, name)
        if is_ is not None and most is not None and is_ > most * (1 + allowance):
            yield f"hot path: {is_:g} {words}, budget {most:g}"
    if not allowance and now["blocks"] < limit.blocks:
        yield f"hot path: {now['blocks']} blocks fit on a multiprocessor, budget {limit.blocks}"


def stale(lines: Lines, rows: list[Row], sources: Iterable[str]) -> list[str]:
    """Lines without a hot path, of sources that were read completely."""
    archs = {row.arch for row in rows}
    seen = {key(row) for row in rows if row.hot is not None}
    return [
        f"{', '.join(k)}: a line of hot_paths.csv without such a kernel"
        for k in lines
        if k[0] in sources and k[-1] in archs and k not in seen
    ]


def update(lines: Lines, rows: list[Row], sources: Iterable[str]) -> tuple[Lines, list[str]]:
    """The lines with what was read, and in words what changed. sources: those read completely."""
    archs = {row.arch for row in rows}
    new = lines_of(rows)
    kept = {k: v for k, v in lines.items() if k in new or k[0] not in sources or k[-1] not in archs}
    changes = [f"gone     hot path of {', '.join(k)}" for k in lines if k not in kept]
    for k, now in new.items():
        if k not in lines:
            changes.append(f"new      hot path of {', '.join(k)}")
            continue
        old = asdict(lines[k])
        for what, value in asdict(now).items():
            if value != old[what]:
                changes.append(f"changed  {', '.join(k)}: hot path, {what} {old[what]} -> {value}")
    return kept | new, changes


def load(path: Path) -> Lines:
    with path.open(newline="") as file:
        return {_key(cells): _line(cells) for cells in csv.DictReader(file)}


def _key(cells: dict[str, str]) -> Key:
    return tuple(cells[name] for name in KEY)  # type: ignore[return-value]


def _line(cells: dict[str, str]) -> Line:
    counts = {field.name: int(cells[field.name]) for field in fields(Line) if field.type is int}
    shared, outside = cells["shared_bytes"], cells["outside"]
    return Line(
        instructions=float(cells["instructions"]),
        shared_bytes=float(shared) if shared else None,
        outside=float(outside) if outside else None,
        cache_bytes=float(cells["cache_bytes"]),
        bound=cells["bound"],
        **counts,
    )


def write(lines: Lines, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEY, *(field.name for field in fields(Line))])
        for k, figures in lines.items():
            cells = ("" if cell is None else cell for cell in astuple(figures))
            writer.writerow([*k, *cells])
