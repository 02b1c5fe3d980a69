"""Rows as tables for people: one table per op, one line per provider in each of its cases."""

from collections.abc import Iterable, Iterator

from ..terminal import BAD, HEAD, OURS, WIDTH, Column, Table, paragraph
from .compare import Key, Ratio, Unit, baseline, case_name, grouped, is_ours, padding, verdicts
from .record import Row

CEILINGS = ("copy", "matmul", "launch gap")


def by_op(rows: Iterable[Row]) -> dict[str, dict[Key, list[Row]]]:
    """The cases of each op, without the ceilings."""
    found: dict[str, dict[Key, list[Row]]] = {}
    for key, group in grouped(rows).items():
        if key[0] not in CEILINGS:
            found.setdefault(key[0], {})[key] = group
    return found


def op_table(op: str, cases: dict[Key, list[Row]]) -> Table:
    """All cases of an op; in each the fastest provider first."""
    everything = [row for rows in cases.values() for row in rows]
    timed = [row for row in everything if row.median_us is not None]
    usual = list(dict.fromkeys(s.provider for rows in cases.values() if (s := baseline(rows))))
    columns = [Column("", left=True)]
    cells: list[dict[int, str]] = []  # a column's, by the row's id
    if timed:
        unit = Unit.of([row.sample.median for row in timed])
        pairs = zip(timed, unit.column(timed), strict=True)
        columns.append(Column(f"median {unit.name}"))
        cells.append({id(row): text for row, text in pairs})
    for heading, column in _more_columns(cases):
        if column:
            columns.append(Column(heading))
            cells.append(column)
    columns, cells = _fitting(columns, cells, everything)
    title = f"{op}; speed-up over {' or '.join(usual)}" if usual else op
    table = Table(columns, title)
    for key, rows in cases.items():
        table.add(_heading(key, rows), style=HEAD)
        stock = baseline(rows)
        for row in sorted(rows, key=lambda row: row.median_us or float("inf")):
            if row.median_us is None:
                table.add(paragraph(f"  {row.provider}: {row.note}", indent=4), style=BAD)
                continue
            slower = stock is not None and row.median_us > stock.sample.median
            style = (BAD if slower else OURS) if is_ours(row) else ""
            table.add(
                f"  {row.provider}", *(column.get(id(row), "") for column in cells), style=style
            )
    return table


def _fitting(
    columns: list[Column], cells: list[dict[int, str]], rows: list[Row]
) -> tuple[list[Column], list[dict[int, str]]]:
    """As many of the columns as a page has room for, from the first; a CSV file has all."""
    table = Table(columns)
    for row in rows:
        table.add(f"  {row.provider}", *(column.get(id(row), "") for column in cells))
    table.fit()
    count = len(columns)
    while sum(column.width + 2 for column in columns[:count]) - 2 > WIDTH and count > 2:
        count -= 1
    return columns[:count], cells[: count - 1]


def _more_columns(cases: dict[Key, list[Row]]) -> Iterator[tuple[str, dict[int, str]]]:
    """Headings and cells; a column that has none is left out."""
    timed = [row for rows in cases.values() for row in rows if row.median_us is not None]
    ratios: dict[int, str] = {}
    for rows in cases.values():
        if stock := baseline(rows):
            ratios |= {
                id(row): f"{Ratio.of(row, stock).value:.2f}" for row in rows if row.median_us
            }
    yield "p99", _p99(timed)
    yield "speed-up", ratios
    yield "% floor", {id(r): percent(r.percent_of_floor) for r in timed if r.percent_of_floor}
    if any(row.modelled_us for row in timed):
        unit = Unit.of([row.sample.median for row in timed])
        known = ((row, row.modelled_us) for row in timed)
        yield "modelled", {id(row): unit.text(us) if us else "-" for row, us in known}
    memory = {id(row): f"{row.peak_memory_mb:,.0f}" for row in timed if row.peak_memory_mb}
    rates = {id(row): f"{row.tokens_per_s:,.0f}" for row in timed if row.tokens_per_s}
    # 80 columns have room for one of the two, in a layer's table for the first alone.
    is_layer = any(row.op.endswith(" layer") for row in timed)
    yield ("MB", memory) if memory or is_layer else ("tokens/s", rates)
    yield "error", {id(row): f"{row.error:.1e}" for row in timed if row.error is not None}


def _p99(timed: list[Row]) -> dict[int, str]:
    """Of latencies, in the unit of the medians."""
    if not any(row.p99_us for row in timed):
        return {}
    unit = Unit.of([row.sample.median for row in timed])
    return {id(row): unit.text(row.p99_us) if row.p99_us else "-" for row in timed}


def percent(share: float) -> str:
    return f"{share:.0f}" if share >= 10 else f"{share:.2g}"


def _heading(key: Key, rows: list[Row]) -> str:
    share = next((padding(row) for row in rows if padding(row) is not None), None)
    return case_name(key) + (f": {100 * share:.0f} % padding" if share else "")


def ceilings(rows: Iterable[Row]) -> Iterator[str]:
    """The measured ceilings, of which the floors are made."""
    for row in rows:
        if row.op == "copy":
            yield f"copy: {row.gb_per_s:.3g} GB/s, read plus written"
        if row.op == "matmul":
            yield f"product {row.shape} {row.dtype}: {row.tflop_per_s:.3g} TFLOP/s"
        if row.op == "launch gap":
            yield f"launch gap: {row.median_us:.2f} us a kernel"


def everything(rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    """All tables, what they show and how to read them: lines, each with its style."""
    rows = list(rows)
    for op, cases in by_op(rows).items():
        yield from op_table(op, cases).lines()
        yield from ((line, "") for line in ("", *verdicts(cases), ""))
    yield legend(any(row.modelled_us for row in rows)), ""


def legend(modelled: bool = False) -> str:
    more = (
        "modelled: what a provider's own traffic, products and kernels should take with these",
        "          ceilings, all of them reached; - where they aren't known",
    )
    return "\n".join(
        (
            "median: of the repeats, \u00b1 half the range from the 20th to the 80th percentile",
            "% floor: the least possible time, from the ceilings above, in percent of the",
            "         time taken; work on padding counts as waste",
            *(more if modelled else ()),
            "tokens/s: real tokens. MB: the peak of memory that a call takes",
            "error: relative, against float64, measured before the time",
        )
    )
