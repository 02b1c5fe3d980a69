"""The README's figures of pre-training, from the files of pretrain_learns and pretrain_speed."""

import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bertfast.commands.bench import style  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LEARNS, SPEED = RESULTS / "pretrain-learns.json", RESULTS / "pretrain-speed.json"
NOT_MEASURED = "Not measured."


def meets(learned: dict[str, Any]) -> bool:
    """True if each seed meets the goals."""
    goals = learned["goals"]
    return all(
        found["mlm_loss"] <= found["unigram_cross_entropy"] - goals["nats_under_unigram"]
        and found["nsp_accuracy"] >= goals["nsp_accuracy"]
        and found["pairs"] >= goals["pairs"]
        for found in (run["held_out"] for run in learned["runs"])
    )


def text() -> str:
    """The README's part."""
    if not (LEARNS.exists() or SPEED.exists()):
        return NOT_MEASURED
    return "\n\n".join((learning(LEARNS), speed(SPEED)))


def learning(path: Path) -> str:
    if not path.exists():
        return NOT_MEASURED
    learned = json.loads(path.read_text())
    settings, where = learned["settings"], learned["environment"]
    held_out = [run["held_out"] for run in learned["runs"]]
    gains = [found["unigram_cross_entropy"] - found["mlm_loss"] for found in held_out]
    right = [100 * found["nsp_accuracy"] for found in held_out]
    said = (
        f"It learns: {settings['layers']} layers of width {settings['width']}, trained for "
        f"{settings['seconds'] / 60:.0f} minutes on {where['threads']} cores ({device(where)}; of "
        f"load {span([run['load_average'] for run in learned['runs']], '.1f')} when each began) on "
        f"the {learned['text']['characters'] / 1e6:.1f} million characters of text that Python "
        f"itself brings along, are {span(gains, '.2f')} nats under the cross-entropy of the "
        f"tokens' frequencies on held-out documents, and tell {span(right, '.1f')} % of "
        f"{min(found['pairs'] for found in held_out):,} pairs right, over {len(held_out)} seeds "
        "(`benchmarks/pretrain_learns.py`)."
    )
    picture = f"benchmarks/results/{path.with_suffix('.png').name}"
    return f"{filled(said)}\n\n![A small BERT learns]({picture})"


def speed(path: Path) -> str:
    if not path.exists():
        return NOT_MEASURED
    found = json.loads(path.read_text())
    settings, where, modelled = found["settings"], found["environment"], found["modelled"]
    said = (
        "Speed of masked-LM training on a CPU, in real tokens per second of processor time, all in "
        f"one run and in turns: {where['threads']} thread of {device(where)}, transformers "
        f"{where['transformers']}; {settings['layers']} layers of width {settings['width']}, "
        f"vocabulary {settings['vocabulary']:,}, {100 * settings['masked_share']:.0f} % of the "
        f"tokens predicted, float32 "
        "(`benchmarks/pretrain_speed.py`). Trainer has stock BertForMaskedLM with SDPA."
    )
    measured = found["measured"]
    lines = ["| | useful tokens |", "| --- | ---: |"]
    for one in measured:
        lines[0] += f" tokens/s, dropout {one['dropout']:g} | over Trainer |"
        lines[1] += " ---: | ---: |"
    for name, what in WAYS.items():
        who, cut = name.split(", ")
        cells = [what, f"{100 * measured[0]['ways'][name]['useful']:.0f} %"]
        for one in measured:
            cells.append(f"{one['ways'][name]['tokens_per_second']:,}")
            cells.append(told(one["over_trainer"][cut]) if who == "recipe" else "")
        lines.append(f"| {' | '.join(cells)} |")
    on_gpu = (
        "On a GPU: not measured. Modelled from counts, with every kernel at an H100's ceilings and "
        "the host always in time, BERT-base packed at 512 in bf16 trains on "
        f"{modelled['tokens_per_second'] / 1e3:.0f}k tokens per second of one H100 "
        "(`benchmarks/pretrain_modelled.py`)."
    )
    return "\n\n".join((filled(said), "\n".join(lines), filled(on_gpu)))


def filled(said: str) -> str:
    return textwrap.fill(said, 105, break_long_words=False, break_on_hyphens=False)


# Way -> its name in the table.
WAYS = {
    "recipe, paragraphs": "paragraphs as texts: the recipe, packed",
    "Trainer, paragraphs": "the same by Trainer, padded to the longest of a batch",
    "recipe, documents": "long texts: the recipe, packed",
    "Trainer, documents": "the same by Trainer, rows filled across texts",
}


def told(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['greatest']:.2f})"


def device(environment: dict[str, Any]) -> str:
    return (
        f"{environment['device'].removeprefix('cpu: ')}, torch {environment['torch']}, "
        f"commit {environment['bertfast_commit']}"
    )


def span(values: list[float], form: str) -> str:
    """The least and the greatest."""
    ends = [format(end(values), form) for end in (min, max)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def draw_learning(learned: dict[str, Any], path: Path) -> None:
    """Held-out loss and accuracy over the steps, a line a seed."""
    plt = style.need_matplotlib()
    runs, where = learned["runs"], learned["environment"]
    unigram = statistics.mean(run["held_out"]["unigram_cross_entropy"] for run in runs)
    with plt.rc_context(style.PARAMETERS | {"ytick.left": True}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
        for run, shade in zip(runs, shades(len(runs)), strict=True):
            curve = run["held_out_curve"]
            steps = [step for step, _, _ in curve]
            label = f"seed {run['seed']}"
            left.plot(*zip(*run["curve"], strict=True), color=shade, alpha=0.35, linewidth=0.9)
            left.plot(steps, [loss for _, loss, _ in curve], "o-", color=shade, label=label)
            right.plot(steps, [100 * share for _, _, share in curve], "o-", color=shade)
        left.axhline(unigram, color=style.INK, linewidth=0.9, linestyle="--")
        left.annotate(
            "by the tokens' frequencies",
            (0.3, unigram),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="left",
            fontsize=8,
        )
        right.axhline(50, color=style.INK, linewidth=0.9, linestyle="--")
        left.set_ylim(top=unigram + 1.2)
        left.set_title("Masked tokens: loss, nats")
        right.set_title("Next sentences: held-out pairs right, %")
        for axes in (left, right):
            axes.set_xlabel("steps")
            axes.grid(axis="y", color=style.PALE, linewidth=0.6)
        left.legend(fontsize=8, loc="upper right")
        settings = learned["settings"]
        style.caption(
            left,
            f"{settings['layers']} layers, width {settings['width']}, vocabulary "
            f"{settings['vocabulary']:,}, {settings['seconds']:.0f} s on {where['threads']} "
            f"threads of {device(where)}, load {span([r['load_average'] for r in runs], '.1f')} "
            f"when they began; {learned['text']['characters']:,} characters of Python "
            f"{where['python']}'s own text. Dots: of held-out documents; thin lines: in training.",
        )
        style.save(figure, path)
        plt.close(figure)


def shades(count: int) -> list[Any]:
    import matplotlib.colors

    base = matplotlib.colors.to_rgb(style.OURS)
    return [
        tuple(1 - (1 - part) * (1 - 0.6 * number / max(1, count)) for part in base)
        for number in range(count)
    ]
