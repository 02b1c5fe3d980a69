"""Plots of rows: speed-up over stock torch, percent of the floor, where a layer's time goes."""

from collections.abc import Sequence
from pathlib import Path

from .record import Row
from .tables import baseline, grouped

OURS, OTHERS = "#1f77b4", ("#b8bec7", "#8d96a3", "#6b7480", "#d5b48c", "#a8c5a0", "#c9a9c6")
KINDS = ("products", "attention", "memory")


def need_matplotlib():
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'bertfast[bench]'") from None
    matplotlib.use("Agg")  # files, no window
    import matplotlib.pyplot as plt

    return plt


def draw(rows: Sequence[Row], device: str, directory: Path) -> list[Path]:
    """Every plot that the rows allow; the files."""
    plt = need_matplotlib()
    found = []
    for name, figure in (
        ("speed-up", _speed_up(plt, rows, device)),
        ("floor", _floor(plt, rows, device)),
        ("layer", _layer(plt, rows, device)),
    ):
        if figure is not None:
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            found.append(path)
    return found


def _is_encoder(row: Row) -> bool:
    return row.tokens_per_s is not None


def _color(provider: str, others: list[str]) -> str:
    return OURS if provider == "bertfast" else OTHERS[others.index(provider) % len(OTHERS)]


def _speed_up(plt, rows: Sequence[Row], device: str):
    """Bars a case: how many times as fast as stock SDPA."""
    cases = {
        key: {row.provider: baseline(group).median_us / row.median_us for row in group}
        for key, group in grouped(row for row in rows if _is_encoder(row)).items()
        if baseline(group) is not None
    }
    if not cases:
        return None
    providers = list(dict.fromkeys(name for found in cases.values() for name in found))
    others = [name for name in providers if name != "bertfast"]
    bar = 0.8 / len(providers)
    figure, axes = plt.subplots(figsize=(8, 0.6 + len(cases) * max(0.45, 0.16 * len(providers))))
    for place, found in enumerate(cases.values()):
        for number, name in enumerate(providers):
            if name in found:
                y = place + (number - (len(providers) - 1) / 2) * bar
                axes.barh(y, found[name], bar * 0.92, color=_color(name, others))
                if name == "bertfast":
                    axes.text(found[name], y, f" {found[name]:.2f}", va="center", fontsize=8)
    for name in providers:
        axes.barh(0, 0, color=_color(name, others), label=name)
    axes.set_yticks(range(len(cases)), [_label(key) for key in cases], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as HF SDPA")
    axes.set_title(device, fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(1.01, 0))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _label(key) -> str:
    op, pass_, shape, dtype, _ = key
    return f"{op} {shape}\n{pass_} {dtype}"


def _floor(plt, rows: Sequence[Row], device: str):
    """Bars an op's case: percent of the floor, bertfast's best and the best of the others."""
    cases = {}
    for key, group in grouped(row for row in rows if not _is_encoder(row)).items():
        timed = [row for row in group if row.percent_of_floor and " layer " not in row.op]
        best = {"bertfast": 0.0, "best other": 0.0}
        for row in timed:
            name = "bertfast" if row.provider.startswith("bertfast") else "best other"
            best[name] = max(best[name], row.percent_of_floor)
        if best["bertfast"]:
            cases[key] = best
    if not cases:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.42 * len(cases)))
    for place, best in enumerate(cases.values()):
        axes.barh(place - 0.2, best["bertfast"], 0.36, color=OURS)
        axes.barh(place + 0.2, best["best other"], 0.36, color=OTHERS[0])
    axes.barh(0, 0, color=OURS, label="bertfast")
    axes.barh(0, 0, color=OTHERS[0], label="the best other")
    axes.set_yticks(
        range(len(cases)), [_label(key).replace("\n", " ") for key in cases], fontsize=7
    )
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("percent of the floor (100: as fast as the ceilings allow)")
    axes.set_title(device, fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _layer(plt, rows: Sequence[Row], device: str):
    """Stacked bars: the time of a layer's parts, of both implementations."""
    cases: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        op, _, kind = row.op.rpartition(" ")
        if kind in KINDS and op.endswith(" layer") and row.median_us is not None:
            cases.setdefault((op, row.shape, row.provider), {})[kind] = row.median_us
    if not cases:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.35 * len(cases)))
    for place, found in enumerate(cases.values()):
        start = 0.0
        total = sum(found.values())
        for kind, color in zip(KINDS, (OURS, "#e39b4e", OTHERS[0]), strict=True):
            share = 100 * found.get(kind, 0.0) / total
            axes.barh(place, share, left=start, color=color, label=kind if not place else None)
            start += share
        axes.text(101, place, f"{total:.4g} us", va="center", fontsize=7)
    axes.set_yticks(range(len(cases)), [" ".join(key) for key in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 115)
    axes.set_xlabel("percent of a layer's parts")
    axes.set_title(device, fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(1.01, 0))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
