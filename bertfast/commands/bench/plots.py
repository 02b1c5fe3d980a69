"""Plots of rows: speed-up over stock torch, percent of the floor, where a layer's time goes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compare import PM, Key, Ratio, Unit, baseline, grouped, half_range, is_ours, padding
from .record import Environment, Row
from .style import (
    COLUMNS,
    ERROR_BAR,
    INK,
    KINDS,
    LOSS,
    OURS,
    PALE,
    PARAMETERS,
    caption,
    color,
    legend,
    need_matplotlib,
    save,
)

WIDTH = 8.0  # inches
CLOCKS = {
    "process": "processor time of one thread",
    "device": "GPU time without launches",
    "call": "time until the GPU is done",
}
SPREAD = "Thin bars: from the 20th to the 80th percentile of the repeats."

SUM_SPREAD = "Thin bars: the spread of the sum."


def draw(rows: Sequence[Row], facts: Environment, directory: Path) -> list[Path]:
    """Every plot that the rows allow; the files."""
    plt = need_matplotlib()
    found = []
    for name, make in (("speed-up", _speed_up), ("floor", _floor), ("layer", _layer)):
        with plt.rc_context(PARAMETERS):
            figure = make(plt, rows, facts)
            if figure is not None:
                found.append(directory / f"{name}.png")
                save(figure, found[-1])
                plt.close(figure)
    return found


def measured_with(rows: Sequence[Row], facts: Environment, *notes: str) -> str:
    """The caption: device, dtypes, clock, versions, and what else must be said."""
    device = facts.device.removeprefix("cpu: ")
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in rows))
    clocks = " and ".join(dict.fromkeys(CLOCKS[row.clock] for row in rows))
    versions = [
        f"{name} {version}"
        for name in ("torch", "triton", "transformers", "cuda", "driver")
        if (version := getattr(facts, name)) not in ("", "absent")
    ]
    text = f"{device}, {clocks}, {dtypes}; {', '.join(versions)}; commit {facts.bertfast_commit}."
    return " ".join((text, *notes))


def _is_encoder(row: Row) -> bool:
    return row.tokens_per_s is not None


def _label(key: Key, rows: Sequence[Row], one_dtype: bool) -> str:
    op, pass_, shape, dtype, dropout = key
    share = next((padding(row) for row in rows if padding(row) is not None), None)
    name = f"{op}  {shape}" + (f", {100 * share:.0f} % padding" if share else "")
    more = [pass_] + ([] if one_dtype else [dtype]) + ([f"dropout {dropout:g}"] if dropout else [])
    return f"{name}\n{', '.join(more)}"


def _frame(plt: Any, height: float, labels: Sequence[str], title: str, rows: int) -> tuple:
    """Axes with a case a line, a title far enough above for a legend of so many rows."""
    figure, axes = plt.subplots(figsize=(WIDTH, height))
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.set_title(title, pad=14 + 14 * rows)
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    return figure, axes


def _aside(axes: Any, y: float, text: str, slower: bool = False, bold: bool = True) -> None:
    """Writes into the margin on the right, which bars and lines leave free."""
    axes.text(
        1.01,
        y,
        text + (" (slower)" if slower else ""),
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=8,
        color=LOSS if slower else OURS if bold else INK,
        fontweight="bold" if bold else None,
    )


def _scale(axes: Any, usual: float, text: str) -> None:
    """The axis of lengths begins at zero; a line marks what is usual."""
    axes.axvline(usual, color=INK, linewidth=1.0)
    axes.set_xlim(left=0)
    axes.set_xlabel(text)


def _bar(axes: Any, y: float, height: float, row: Row, scale: float, shade: str) -> float:
    """A bar as long as scale / time, with its spread; the length."""
    took = row.sample
    value = scale / took.median
    reach = [[value - scale / took.p80], [scale / took.p20 - value]]
    axes.barh(y, value, height, xerr=reach, color=shade, error_kw=ERROR_BAR)
    return value


def _speed_up(plt: Any, rows: Sequence[Row], facts: Environment) -> Any:
    """Bars for each case: how many times as fast as stock SDPA."""
    found = grouped(row for row in rows if _is_encoder(row))
    usual = {key: stock for key, group in found.items() if (stock := baseline(group))}
    groups = {key: [row for row in found[key] if row.median_us is not None] for key in usual}
    everything = [row for group in groups.values() for row in group]
    over = baseline(everything)
    if over is None:
        return None
    providers = list(dict.fromkeys(row.provider for row in everything))
    one_dtype = len({row.dtype for row in everything}) == 1
    height = 0.8 / len(providers)
    labels = [_label(key, group, one_dtype) for key, group in groups.items()]
    figure, axes = _frame(
        plt,
        0.5 + len(groups) * max(0.45, 0.145 * len(providers)),
        labels,
        f"Times as fast as {over.provider}",
        -(-len(providers) // COLUMNS),
    )
    for place, (key, group) in enumerate(groups.items()):
        scale = usual[key].sample.median
        for row in group:
            y = place + (providers.index(row.provider) - (len(providers) - 1) / 2) * height
            value = _bar(axes, y, 0.9 * height, row, scale, color(row.provider))
            if row.provider == "bertfast":
                _aside(axes, y, str(Ratio.of(row, usual[key])), value < 1)
    _scale(axes, 1, f"longer is faster; 1 is {over.provider}")
    legend(axes, providers, [color(name) for name in providers])
    note = f"On the right: bertfast, {PM} the spreads of both."
    caption(axes, measured_with(everything, facts, SPREAD, note))
    return figure


def _floor(plt: Any, rows: Sequence[Row], facts: Environment) -> Any:
    """Two bars for each case of an op: percent of the floor, bertfast's best and the best other."""
    best: dict[Key, list[Row | None]] = {}
    for key, group in grouped(row for row in rows if not _is_encoder(row)).items():
        timed = [row for row in group if row.percent_of_floor and " layer " not in row.op]
        ours = [row for row in timed if is_ours(row)]
        others = [row for row in timed if not is_ours(row)]
        if ours:
            best[key] = [
                min(those, key=lambda row: row.sample.median, default=None)
                for those in (ours, others)
            ]
    if not best:
        return None
    everything = [row for pair in best.values() for row in pair if row is not None]
    one_dtype = len({row.dtype for row in everything}) == 1
    labels = [_label(key, (), one_dtype).replace("\n", ", ") for key in best]
    title = "Percent of the floor: the least possible time by the time taken"
    figure, axes = _frame(plt, 0.6 + 0.42 * len(best), labels, title, 1)
    shades = (OURS, color("HF SDPA"))
    for place, pair in enumerate(best.values()):
        fastest = min((row for row in pair if row), key=lambda row: row.sample.median)
        for row, y, shade in zip(pair, (place - 0.19, place + 0.19), shades, strict=True):
            if row is None:
                continue
            scale = (row.percent_of_floor or 0.0) * row.sample.median
            value = _bar(axes, y, 0.34, row, scale, shade)
            slower = is_ours(row) and row is not fastest
            _aside(axes, y, f"{value:.0f} %  {row.provider}", slower, bold=is_ours(row))
    _scale(axes, 100, "longer is faster; 100 is as fast as the machine's measured ceilings allow")
    legend(axes, ("bertfast's best", "the best other"), shades)
    caption(axes, measured_with(everything, facts, SPREAD))
    return figure


def _layer(plt: Any, rows: Sequence[Row], facts: Environment) -> Any:
    """Stacked bars: the time of a layer's parts, beside the time of stock torch's calls."""
    cases: dict[tuple[str, str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        op, _, kind = row.op.rpartition(" ")
        if kind in KINDS and op.endswith(" layer") and row.median_us is not None:
            found = cases.setdefault((op.removesuffix(" layer"), row.shape, row.dtype), {})
            found.setdefault(row.provider, {})[kind] = row
    if not cases:
        return None
    bars = [(key, provider) for key, found in cases.items() for provider in found]
    everything = [r for found in cases.values() for kinds in found.values() for r in kinds.values()]
    totals = {
        (key, provider): sum(row.sample.median for row in kinds.values())
        for key, found in cases.items()
        for provider, kinds in found.items()
    }
    unit = Unit.of(list(totals.values()))
    one_dtype = len({row.dtype for row in everything}) == 1
    names = {key: " ".join(key[: 2 if one_dtype else 3]) for key in cases}
    # The bars of a case stand close, its name once in front of them.
    places, place = {}, 0.0
    for number, bar in enumerate(bars):
        if number:
            place += 1.0 if bars[number - 1][0] == bar[0] else 1.5
        places[bar] = place
    figure, axes = _frame(plt, 0.8 + 0.3 * (place + 1), [], "Where a layer's time goes", 1)
    axes.set_ylim(place + 0.7, -0.7)
    axes.set_yticks(
        list(places.values()),
        [
            provider if number and bars[number - 1][0] == key else f"{names[key]}   {provider}"
            for number, (key, provider) in enumerate(bars)
        ],
        fontsize=8,
    )
    for (key, provider), y in places.items():
        whole = totals.get((key, "HF SDPA")) or totals[key, provider]
        start = 0.0
        for kind, shade in KINDS.items():
            if part := cases[key][provider].get(kind):
                share = 100 * part.sample.median / whole
                axes.barh(y, share, 0.82, left=start, color=shade)
                start += share
        spread = math.hypot(*map(half_range, cases[key][provider].values()))
        axes.errorbar(start, y, xerr=100 * spread / whole, fmt="none", **ERROR_BAR)
        slower = provider == "bertfast" and start > 100
        text = f"{unit.text(totals[key, provider])} {unit.name}"
        _aside(axes, y, text, slower, bold=provider == "bertfast")
    for tick, (_, provider) in zip(axes.get_yticklabels(), bars, strict=True):
        if provider == "bertfast":
            tick.set(color=OURS, fontweight="bold")
    _scale(axes, 100, "time, in percent of all parts of HF SDPA's layer; shorter is faster")
    legend(axes, list(KINDS), list(KINDS.values()))
    notes = ("Each part is timed apart: what lies between them isn't in the sum.", SUM_SPREAD)
    caption(axes, measured_with(everything, facts, *notes))
    return figure
