"""How every plot looks: one colour for each provider, a frame, a caption."""

import textwrap
from collections.abc import Sequence
from typing import Any

from ..errors import need
from .providers import TABLE

PROVIDERS = {provider.name: provider.color for provider in TABLE}
OURS = PROVIDERS["bertfast"]
UNKNOWN = "#d0ccc4"
COLUMNS = 5  # of a legend
# The kinds of work in a layer.
KINDS = {"products": "#6d6875", "attention": "#e0903f", "memory": "#8fb07a"}
INK, PALE, LOSS = "#22262b", "#d9dcdf", "#b3261e"
PARAMETERS = {
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.left": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 144,
}
ERROR_BAR = {"ecolor": INK, "elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8}


def need_matplotlib() -> Any:
    """pyplot, drawing into files."""
    need("a plot", ("matplotlib",), "bench")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def color(provider: str) -> str:
    return PROVIDERS.get(provider, UNKNOWN)


def legend(axes: Any, names: Sequence[str], colors: Sequence[str]) -> None:
    """In a line above the bars."""
    pairs = zip(names, colors, strict=True)
    handles = [axes.bar([0], [0], color=one, label=name) for name, one in pairs]
    axes.legend(
        handles=handles,
        fontsize=8,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=min(COLUMNS, len(names)),
        borderaxespad=0.2,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.4,
    )


def caption(axes: Any, text: str, below: int = 38, width: int = 112) -> None:
    """Small, so many points below the axes: what the numbers were measured with."""
    axes.annotate(
        textwrap.fill(text, width),
        (0, 0),
        (0, -below),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=7,
        color=PROVIDERS["HF SDPA"],
        va="top",
        linespacing=1.4,
    )


def save(figure: Any, path: Any) -> None:
    """The same bytes for the same numbers."""
    metadata = {"Software": None} if str(path).endswith(".png") else None
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15, metadata=metadata)
