"""Medians with their spread, in one unit per column, and how many times as fast one is as another.

A spread, written behind the sign of plus and minus, is half the range from the 20th to the 80th
percentile of the repeats.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .record import Row

PM = "\u00b1"
UNITS = (("s", 1e6), ("ms", 1e3), ("us", 1.0))

Key = tuple[str, str, str, str, float]


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Timed rows by (op, pass, shape, dtype, dropout), in the order in which they came."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        if row.clock != "launch" and (row.median_us is not None or row.note):
            key = (row.op, row.pass_, row.shape, row.dtype, row.dropout)
            found.setdefault(key, []).append(row)
    return found


def case_name(key: Key) -> str:
    """A case among others of the same op."""
    _, pass_, shape, dtype, dropout = key
    return f"{shape}, {pass_}, {dtype}" + (f", dropout {dropout:g}" if dropout else "")


def padding(row: Row) -> float | None:
    """The part of a batch that is padding."""
    if not row.tokens_per_s or not row.padded_tokens_per_s:
        return None
    return 1 - row.tokens_per_s / row.padded_tokens_per_s


def is_ours(row: Row) -> bool:
    return row.provider.startswith("bertfast")


def baseline(rows: Iterable[Row]) -> Row | None:
    """The row that speed-ups are counted from: the usual way to run the case with stock torch."""
    timed = {row.provider: row for row in rows if row.median_us is not None}
    return next((timed[n] for n in ("HF SDPA", "torch sdpa", "torch eager") if n in timed), None)


def half_range(row: Row) -> float:
    return (row.sample.p80 - row.sample.p20) / 2


@dataclass(frozen=True)
class Unit:
    """The unit of a column's times, chosen by all its values together."""

    name: str
    factor: float
    digits: int  # behind the point

    @classmethod
    def of(cls, times_us: Sequence[float]) -> "Unit":
        """The unit of their middle, with three digits of the least one."""
        middle = math.exp(sum(map(math.log, times_us)) / len(times_us))
        name, factor = next((unit for unit in UNITS if middle >= unit[1]), UNITS[-1])
        return cls(name, factor, max(0, 2 - math.floor(math.log10(min(times_us) / factor))))

    def text(self, us: float) -> str:
        return f"{us / self.factor:.{self.digits}f}"

    def spread(self, us: float) -> str:
        """A spread that would round to zero is given as "<0.01"; a single repeat has none: "?"."""
        if us == 0:
            return "?"
        text, least = self.text(us), 10.0**-self.digits
        return f"<{least:.{self.digits}f}" if float(text) == 0 else text

    def column(self, rows: Sequence[Row], align: bool = True) -> list[str]:
        """The rows' medians and spreads, one below the other."""
        spreads = [self.spread(half_range(row)) for row in rows]
        width = max(map(len, spreads), default=0) if align else 0
        pairs = zip(rows, spreads, strict=True)
        return [f"{self.text(row.sample.median)} {PM} {spread:>{width}}" for row, spread in pairs]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast."""

    value: float
    spread: float

    @classmethod
    def of(cls, ours: Row, other: Row) -> "Ratio":
        """Both spreads are in it, taken as independent."""
        value = other.sample.median / ours.sample.median
        relative = math.hypot(*(half_range(row) / row.sample.median for row in (ours, other)))
        return cls(value, value * relative)

    def __str__(self) -> str:
        return f"{self.value:.2f} {PM} {self.spread:.2f}"


def mean(ratios: Sequence[Ratio]) -> Ratio:
    """The geometric mean."""
    value = math.exp(sum(math.log(ratio.value) for ratio in ratios) / len(ratios))
    relative = math.hypot(*(ratio.spread / ratio.value for ratio in ratios)) / len(ratios)
    return Ratio(value, value * relative)


def verdicts(cases: dict[Key, list[Row]]) -> list[str]:
    """A sentence for each provider that ours stands beside, and a line with the worst case.

    The first of ours is compared with all others, another of ours with the baseline alone.
    """
    timed = {
        key: {row.provider: row for row in rows if row.median_us is not None}
        for key, rows in cases.items()
    }
    by_name = {row.provider: row for rows in timed.values() for row in rows.values()}
    ours = [name for name, row in by_name.items() if is_ours(row)]
    others = [name for name in by_name if name not in ours]
    usual = {stock.provider for rows in timed.values() if (stock := baseline(rows.values()))}
    lines = []
    for name in ours:
        for other in others:
            found = {
                key: Ratio.of(rows[name], rows[other])
                for key, rows in timed.items()
                if name in rows and other in rows
            }
            if found and (name == ours[0] or other in usual):
                lines += _sentence(name, other, found)
    return lines


def _sentence(name: str, other: str, found: dict[Key, Ratio]) -> list[str]:
    text = f"{name} is {mean(list(found.values()))} times as fast as {other}"
    if len(found) == 1:
        return [text]
    worst = min(found, key=lambda key: found[key].value)
    where = _among(worst, list(found))
    return [text, f"  geometric mean of {len(found)}; worst {found[worst]}: {where}"]


def _among(key: Key, keys: Sequence[Key]) -> str:
    """A case's name without what all the others share, too."""
    _, pass_, shape, dtype, dropout = key
    parts = [shape, pass_]
    if len({other[3] for other in keys}) > 1:
        parts.append(dtype)
    if len({other[4] for other in keys if other[:4] == key[:4]}) > 1:
        parts.append(f"dropout {dropout:g}")
    return ", ".join(parts)
