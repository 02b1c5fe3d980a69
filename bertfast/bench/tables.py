"""Rows as tables for people: one line a case, one column a provider."""

from collections.abc import Iterable

from rich import box
from rich.table import Table

from .record import Row

Key = tuple[str, str, str, str, float]


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Timed rows by (op, pass, shape, dtype, dropout), in the order in which they came."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        if row.clock != "launch" and (row.median_us is not None or row.note):
            key = (row.op, row.pass_, row.shape, row.dtype, row.dropout)
            found.setdefault(key, []).append(row)
    return found


def duration(us: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= factor:
            return (
                f"{us / factor:.3g} {unit}" if us < 1000 * factor else f"{us / factor:.0f} {unit}"
            )
    return f"{us:.3g} us"


def count(number: float) -> str:
    """Three digits with k or M."""
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


def baseline(rows: list[Row]) -> Row | None:
    """What speed-ups are counted from: the usual way of running it with stock torch."""
    for name in ("HF SDPA", "torch sdpa", "torch eager"):
        for row in rows:
            if row.provider == name and row.median_us is not None:
                return row
    return None


def case_table(key: Key, rows: list[Row]) -> Table:
    """All providers of one case, the fastest first."""
    op, pass_, shape, dtype, dropout = key
    title = f"{op}, {shape}, {pass_}, {dtype}" + (f", dropout {dropout:g}" if dropout else "")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("provider")  # the only one that may wrap
    columns = ["median", "spread", "speed-up", "floor", "error"]
    tokens = any(row.tokens_per_s for row in rows)
    memory = any(row.peak_memory_mb for row in rows)
    columns += (["tokens/s", "padded/s"] if tokens else []) + (["memory"] if memory else [])
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    stock = baseline(rows)
    timed = sorted((row for row in rows if row.median_us is not None), key=lambda r: r.median_us)
    for row in timed:
        cells = [
            duration(row.median_us),
            f"{100 * (row.p80_us - row.p20_us) / row.median_us:.0f}%",
            f"{stock.median_us / row.median_us:.2f}" if stock else "",
            f"{row.percent_of_floor:.0f}%" if row.percent_of_floor else "",
            f"{row.error:.0e}" if row.error is not None else "",
        ]
        if tokens:
            cells += [count(row.tokens_per_s or 0), count(row.padded_tokens_per_s or 0)]
        if memory:
            cells.append(f"{row.peak_memory_mb:.0f} MB" if row.peak_memory_mb else "")
        style = "bold green" if row.provider.startswith("bertfast") else None
        table.add_row(row.provider, *cells, style=style)
    for row in rows:
        if row.median_us is None:
            table.add_row(row.provider, row.note[:60], *[""] * (len(columns) - 1), style="red")
    return table
