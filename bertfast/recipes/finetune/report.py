"""Figures of a run as JSON, as a table, as plots and in TensorBoard."""

import json
from pathlib import Path
from typing import Any

from ...commands.bench import style
from ..pretrain.shards import write_json

FILE = "metrics.json"


def table(figures: dict[str, dict[str, float]]) -> list[str]:
    """Markdown: a line for each figure, a column for each part of the data."""
    parts = list(figures)
    names = list(dict.fromkeys(name for part in figures.values() for name in part))
    lines = [f"| | {' | '.join(parts)} |", f"|---|{'---:|' * len(parts)}"]
    for name in names:
        cells = [f"{figures[part][name]:.4f}" if name in figures[part] else "" for part in parts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def each_table(each: dict[str, dict[str, float]]) -> list[str]:
    """Of each label."""
    lines = ["| | precision | recall | f1 | number |", "|---|---:|---:|---:|---:|"]
    for label, row in each.items():
        figures = " | ".join(f"{row[name]:.3f}" for name in ("precision", "recall", "f1"))
        lines.append(f"| {label.replace('|', ' ')} | {figures} | {row['support']:.0f} |")
    return lines


def write(
    folder: Path,
    figures: dict[str, dict[str, float]],
    tables: dict[str, Any],
    history: list[dict[str, Any]],
) -> None:
    """metrics.json, and the plots that there is something to draw of."""
    write_json(folder / FILE, {"figures": figures, **tables, "history": history})
    plt = style.need_matplotlib()
    _curves(plt, history, folder / "training.png")
    if "confusion" in tables and len(tables["labels"]) <= 30:
        _confusion(plt, tables["labels"], tables["confusion"], folder / "confusion.png")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FILE).read_bytes())


def _curves(plt: Any, history: list[dict[str, Any]], path: Path) -> None:
    steps = [(one["step"], one["loss"]) for one in history if "loss" in one]
    held = [(one["step"], one["eval_loss"]) for one in history if "eval_loss" in one]
    with plt.rc_context(style.PARAMETERS):
        figure, axes = plt.subplots(figsize=(6, 3.4))
        if steps:
            axes.plot(*zip(*steps, strict=True), color=style.OURS, label="training")
        if held:
            axes.plot(*zip(*held, strict=True), color=style.INK, marker="o", label="held out")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        axes.legend()
        style.save(figure, path)
        plt.close(figure)


def _confusion(plt: Any, labels: list[str], matrix: list[list[int]], path: Path) -> None:
    """Rows: the true label. Colours are shares of a row, numbers are counts."""
    size = max(3.2, 1.6 + 0.5 * len(labels))
    with plt.rc_context(style.PARAMETERS):
        figure, axes = plt.subplots(figsize=(size, size))
        shares = [[count / max(1, sum(row)) for count in row] for row in matrix]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for y, row in enumerate(matrix):
            for x, count in enumerate(row):
                colour = "white" if shares[y][x] > 0.6 else "black"
                axes.text(x, y, f"{count:,}", ha="center", va="center", color=colour, size=8)
        names = [label if len(label) < 20 else label[:18] + "…" for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.grid(False)
        style.save(figure, path)
        plt.close(figure)
