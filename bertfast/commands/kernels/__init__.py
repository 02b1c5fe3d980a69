"""`bertfast kernels`: what the compiler made of every kernel, against a committed budget.

Reads the machine code of the Triton kernels (compiled ahead of time) and of the CUDA kernels (what
`bertfast._cuda` carries) for each architecture. No GPU is needed.
"""

import json
import queue
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..errors import UserError, one_of, writable_file
from ..terminal import BAD, GOOD, Progress, console, paragraph
from . import budget as budgets
from . import cuda_modules, hot_budget, model, peers, triton_aot
from .occupancy import CAPABILITIES
from .report import NOTE, Summary, print_every
from .rows import Row, aot_names
from .sass import MissingTool, capability

DEFAULT_ARCHS = ["sm_80", "sm_90a", "sm_100", "sm_120"]


@dataclass
class Reading:
    """All that could be read on this machine."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # what should have compiled, and didn't
    complete_sources: list[str] = field(default_factory=list)


def read(
    archs: list[str],
    op: str | None = None,
    done: Callable[[list[Row]], None] = lambda rows: None,
    say: Callable[[str, int], None] = lambda text, ended: None,
) -> Reading:
    """The kernels of one op or of all, compiled for each architecture.

    done: called, in this thread, with the rows of each op for an architecture when all are there.
    say: called with a line on how far it is, and the number of compilers' runs that are over.
    """
    modules = [module for name, module in aot_names().items() if op in (None, name)]

    def triton(arch: str, seen: Callable[[Row], None]) -> list[str]:
        return triton_aot.read(arch, modules, seen)[1]

    def cuda(arch: str, seen: Callable[[Row], None]) -> list[str]:
        for row in sorted(cuda_modules.read(arch, op), key=lambda row: row.op):
            seen(row)
        return []

    readers = {"triton": triton, "cuda": cuda}
    jobs = [(source, arch) for source in readers for arch in archs]
    found: dict[tuple[str, str], list[Row]] = {job: [] for job in jobs}
    ends: dict[tuple[str, str], list[str] | Exception] = {}
    for job, what in _events(readers, jobs):
        rows = found[job]
        if isinstance(what, Row):
            if rows and rows[-1].op != what.op:
                done([row for row in rows if row.op == rows[-1].op])
            rows.append(what)
        else:
            if rows:
                done([row for row in rows if row.op == rows[-1].op])
            ends[job] = what
        say(f"{sum(map(len, found.values()))} kernels, {job[0]} for {job[1]}", len(ends))
    return _reading(jobs, found, ends, whole=op is None)


def _events(readers: dict[str, Callable], jobs: list[tuple[str, str]]) -> Iterator[tuple]:
    """Each job's rows as they come, and at its end what failed to compile or why it can't be read.

    Two at a time; each works in a process of its own.
    """
    events: queue.SimpleQueue = queue.SimpleQueue()

    def work(job: tuple[str, str]) -> None:
        source, arch = job
        try:
            events.put((job, readers[source](arch, lambda row: events.put((job, row)))))
        except Exception as error:
            events.put((job, error))

    pool = ThreadPoolExecutor(2)
    try:
        for job in jobs:
            pool.submit(work, job)
        ended = 0
        while ended < len(jobs):
            event = events.get()
            ended += not isinstance(event[1], Row)
            yield event
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing more is begun


def _reading(
    jobs: list[tuple[str, str]],
    found: dict[tuple[str, str], list[Row]],
    ends: dict[tuple[str, str], list[str] | Exception],
    whole: bool,
) -> Reading:
    reading = Reading()
    reasons: dict[tuple[str, str], list[str]] = {}
    for job in jobs:
        (source, arch), end = job, ends[job]
        if isinstance(end, (triton_aot.LeftOut, cuda_modules.LeftOut, MissingTool)):
            reasons.setdefault((source, str(end)), []).append(arch)
        elif isinstance(end, RuntimeError):
            reading.failures.append(f"{source} {arch}: {end}")
        elif isinstance(end, Exception):
            raise end
        else:
            reading.rows += found[job]
            reading.failures += end
            if found[job] and source not in reading.complete_sources:
                reading.complete_sources.append(source)
    reading.left_out = [f"{source} {', '.join(on)}: {why}" for (source, why), on in reasons.items()]
    # Which of Triton's kernels serve a call, a table says by architecture.
    if any(not found.get(("triton", arch)) for arch in DEFAULT_ARCHS):
        reading.complete_sources = [s for s in reading.complete_sources if s != "triton"]
    if not whole or reading.failures:  # parts are missing: nothing can be called stale
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
        allowance = _allowance(source, budget, present)
        for verdict in budgets.check(budget, rows, allowance):
            row = verdict.row
            assert row is not None
            lines.append(
                f"FAIL {source} {row.kernel}, {row.label}, {row.dtypes}, {row.arch}: {verdict.text}"
            )
    for verdict in budgets.stale(budget, reading.rows, reading.complete_sources):
        lines.append(f"FAIL {verdict.text}")
    return lines


def _allowance(source: str, budget: dict, present: dict[str, str | None]) -> float:
    """The part by which instructions may exceed a budget that another compiler has measured."""
    same = present[source] == budget.get("measured_with", {}).get(source)
    return 0.0 if same else budget.get("allowance_for_other_compilers", 0.0)


def parse_archs(text: str | None) -> list[str]:
    """ "sm_80,sm_90a" -> its parts."""
    if text is None:
        return DEFAULT_ARCHS
    known = [f"sm_{number}" for number in CAPABILITIES]
    chosen = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for arch in chosen:
        if not re.fullmatch(r"sm_\d+[af]?", arch) or capability(arch) not in CAPABILITIES:
            one_of("--archs, but for an a or f at the end,", arch, known)
    return chosen


def kernels(
    archs: str | None = None,
    op: str | None = None,
    *,
    every: bool = False,
    with_peers: bool = False,
    with_model: bool = False,
    as_json: bool = False,
    update_budget: bool = False,
) -> int:
    """Prints the report; returns the exit code: 1 if a kernel exceeds the budget."""
    if every and as_json:
        raise UserError("--all is for the tables: --json has every kernel in any case")
    if as_json and (with_peers or with_model):
        raise UserError("--peers and --model are tables: --json has neither")
    if update_budget:
        writable_file("--update-budget", budgets.PATH)
    out = console()
    chosen = parse_archs(archs)
    present, budget = compilers(), budgets.load()
    with Progress(2 * len(chosen)) as progress:
        summary = Summary(out, list(aot_names()), chosen)

        def done(rows: list[Row]) -> None:
            if not as_json:
                progress.clear()
                summary.add(rows, budget, _allowance(rows[0].source, budget, present))

        def say(text: str, ended: int) -> None:
            progress.done = ended
            progress.show(text)

        reading = read(chosen, op, done, say)
    if not reading.rows and not reading.failures:
        raise UserError(f"nothing could be read on this machine: {'; '.join(reading.left_out)}")
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
    out.print()
    if every:
        print_every(reading.rows, chosen, out)
    else:
        out.print(paragraph(NOTE))
    if with_peers or with_model:
        out.print()
    if with_peers:
        peers.print_peers(hot_budget.lines_of(reading.rows), budget, out)
    if with_model:
        model.print_model(reading.rows, out)
    for source, version in present.items():
        if any(row.source == source for row in reading.rows):
            was = budget.get("measured_with", {}).get(source)
            other = "" if version == was else f" (the budget was measured with {was})"
            compiler = {"triton": "Triton", "cuda": "nvcc"}[source]
            out.print(f"{source}: compiled by {compiler} {version}{other}")
    for line in changes:
        out.print(f"budget: {line}")
    for line in reading.left_out:
        out.print(paragraph(f"left out: {line}", indent=2), style="yellow")
    for line in failures:
        out.print(line, style=BAD)
    if not failures:
        forms = len({row.form for row in reading.rows})
        text = f"PASS {forms} kernels in {len(reading.rows)} compilations are within the budget"
        out.print(text, style=GOOD)
    return int(bool(failures))
