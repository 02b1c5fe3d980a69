"""The README's performance tables and plots, generated from the committed CSV files.

    python benchmarks/report.py           writes them
    python benchmarks/report.py --check   exit status 1 if the README's tables aren't these

Every benchmarks/results/DIR/results.csv is one run of run_all.py or of `bertfast bench --csv`, and
masked-lm-loss.json one of masked_lm_loss.py. What no file has is written 'not measured'. Counts of
machine code are those of the budget of `bertfast kernels`, and of peers.csv beside it. Nothing
between the README's markers is typed.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pretrain_report  # noqa: E402

from bertfast.commands.bench.compare import PM, Ratio, Unit, baseline, grouped, is_ours, verdicts  # noqa: E402
from bertfast.commands.bench.lengths import MIXES  # noqa: E402
from bertfast.commands.bench.record import Environment, Row, read  # noqa: E402
from bertfast.commands.bench.tables import by_op, percent  # noqa: E402
from bertfast.commands.kernels import budget, peers, products  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "not measured"
SPREAD = f"{PM}: half the range from the 20th to the 80th percentile of the repeats."
# The README's GPU tables: (model, shape or mix, pass), whatever was measured.
MODEL_CASES = [
    ("BERT-base", "32x512", "forward"),
    ("BERT-base", "32x128", "forward"),
    ("BERT-base", "squad", "forward"),
    ("BERT-base", "queries", "forward"),
    ("BERT-base", "wikipedia", "forward"),
    ("BERT-base", "1x128", "latency"),
    ("BERT-base", "32x512", "forward+backward"),
    ("BERT-base", "squad", "forward+backward"),
    ("BERT-large", "64x384", "forward"),
    ("BERT-large", "64x384", "forward+backward"),
    ("MiniLM-L6", "64x384", "forward"),
]
OTHERS = (
    "HF eager",
    "HF SDPA",
    "HF SDPA graph",
    "torch compile",
    "torch compile max",
    "flash-attn varlen",
    "nn.TransformerEncoder",
)
WAITING = (
    "`benchmarks/run_all.py` measures BERT-base,\nBERT-large and MiniLM at 1x128, 8x128, 32x128, "
    "32x512 and 64x384 and at realistic lengths,\nforward, forward+backward and latency; its "
    "tables and plots come here."
)
OP_CASES = [
    ("layer_norm", "16384x768", "forward", 0.0),
    ("layer_norm", "16384x768", "backward", 0.1),
    ("bias_gelu", "16384x3072", "forward", 0.0),
    ("bias_gelu", "16384x3072", "backward", 0.0),
    ("linear_gelu", "16384x768x3072", "forward", 0.0),
    ("linear_gelu", "16384x768x3072", "backward", 0.0),
    ("attention_qkv", "32x512x12x64", "forward", 0.0),
    ("attention_qkv", "32x512x12x64", "backward", 0.1),
    ("attention_qkv", "squad", "forward", 0.0),
    ("attention_qkv", "queries", "forward", 0.0),
    ("attention_qkv", "32x512x12x64 rotary", "forward", 0.0),
    ("attention_qkv", "16x1024x12x64 rotary window 64+64", "forward", 0.0),
    ("attention_qkv", "16x1024x12x64 rotary window 64+64", "backward", 0.0),
    ("attention_qkv", "32x512x12x64 bias 128", "forward", 0.0),
    ("attention_qkv", "32x512x12x64 bias 128", "backward", 0.1),
]


@dataclass(frozen=True)
class Run:
    """One CSV file."""

    path: Path
    rows: list[Row]
    environment: Environment

    @property
    def gpu(self) -> bool:
        return not self.environment.device.startswith("cpu: ")

    @property
    def where(self) -> str:
        facts = vars(self.environment)
        names = ("torch", "triton", "transformers", "cuda", "driver")
        versions = [f"{name} {facts[name]}" for name in names if facts[name]]
        device = self.environment.device.removeprefix("cpu: ")
        return f"{device}, {', '.join(versions)}, commit {self.environment.bertfast_commit}"


def runs(directory: Path = RESULTS) -> list[Run]:
    return [Run(path, *read(path)) for path in sorted(directory.glob("*/results.csv"))]


def table(heading: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(heading) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, rule, *lines))


def find(run: Run | None, op: str, shape: str, pass_: str, dropout=None) -> list[Row]:
    """The timed rows of a case; a mix is found by its name alone."""
    if run is None:
        return []
    for key, found in grouped(run.rows).items():
        if (key[0], key[1]) == (op, pass_) and dropout in (None, key[4]):
            mix, _, sizes = key[2].partition(" ")
            if key[2] == shape or (shape in MIXES and mix == shape and " " not in sizes):
                return [row for row in found if row.median_us is not None]
    return []


def best(rows: list[Row], ours: bool) -> Row | None:
    those = [row for row in rows if is_ours(row) == ours]
    return min(those, key=lambda row: row.median_us, default=None)


class Times:
    """A column of medians with their spread, in one unit."""

    def __init__(self, rows: list[Row | None]):
        there = [row for row in rows if row is not None]
        self.unit = Unit.of([row.median_us for row in there]) if there else None
        texts = iter(self.unit.column(there, align=False) if there else ())
        self.cells = [NOT_MEASURED if row is None else next(texts) for row in rows]

    def heading(self, name: str) -> str:
        return f"{name}, {self.unit.name}" if self.unit else name


def models(run: Run | None) -> str:
    """Our time and floor, and how many times as fast as each of the others."""
    cases = [find(run, *case) for case in MODEL_CASES]
    ours = [best(rows, ours=True) for rows in cases]
    times = Times(ours)
    lines = []
    for (model, shape, pass_), rows, row, time in zip(
        MODEL_CASES, cases, ours, times.cells, strict=True
    ):
        others = {other.provider: other for other in rows}
        cells = [f"{model} {shape}, {pass_}", time, _percent(row)]
        lines.append(cells + [_ratio(row, others.get(name)) for name in OTHERS])
    heading = ["", times.heading("bertfast"), "% of floor", *(f"over {name}" for name in OTHERS)]
    return table(heading, lines)


def ops(run: Run | None) -> str:
    """Percent of the floor: ours and the best of the others."""
    cases = [find(run, *case) for case in OP_CASES]
    ours, others = ([best(rows, ours=which) for rows in cases] for which in (True, False))
    times, other_times = Times(ours), Times(others)
    lines = []
    for number, (op, shape, pass_, dropout) in enumerate(OP_CASES):
        other = others[number]
        name = "" if other is None else f"{other.provider}, "
        lines.append(
            [
                f"{op} {shape}, {pass_}" + (f", dropout {dropout:g}" if dropout else ""),
                times.cells[number],
                _percent(ours[number]),
                name + other_times.cells[number],
                _percent(other),
            ]
        )
    heading = ["", times.heading("bertfast"), "% of floor", other_times.heading("the best other")]
    return table([*heading, "% of floor"], lines)


def _ratio(ours: Row | None, other: Row | None) -> str:
    return NOT_MEASURED if ours is None or other is None else str(Ratio.of(ours, other))


def _percent(row: Row | None) -> str:
    return NOT_MEASURED if row is None else percent(row.percent_of_floor)


def cpu(run: Run | None) -> str:
    """Every model case that was measured."""
    lines = []
    for (op, pass_, shape, dtype, _), rows in grouped(run.rows if run else []).items():
        stock = baseline(rows)
        timed = {row.provider: row for row in rows if row.median_us is not None}
        ours, other = timed.get("bertfast"), timed.get("nn.TransformerEncoder")
        if ours is None or stock is None or ours.tokens_per_s is None:
            continue
        waste = ours.padded_tokens_per_s / ours.tokens_per_s
        lines.append(
            [
                f"{op} {shape}, {pass_}, {dtype}",
                f"{ours.tokens_per_s:,.0f}",
                f"{stock.tokens_per_s:,.0f}",
                _ratio(ours, stock),
                _ratio(ours, other),
                f"{waste:.2f}",
                _percent(ours),
                f"{ours.error:.1e}",
            ]
        )
    if not lines:
        return NOT_MEASURED
    heading = ["", "bertfast tokens/s", "HF SDPA tokens/s", "over HF SDPA"]
    heading += ["over nn.TransformerEncoder", "padded to real tokens", "% of floor", "error"]
    return f"{table(heading, lines)}\n\n{comparison(run)}"


def comparison(run: Run) -> str:
    """How bertfast compares over all cases of a model: a list of sentences."""
    sentences = []
    for op, cases in by_op(row for row in run.rows if row.tokens_per_s).items():
        for line in verdicts(cases):
            sentences.append(f"; {line.strip()}" if line.startswith(" ") else f"\n- {op}: {line}")
    return "".join(sentences).strip()


def parts(found: list[Run]) -> dict[str, str]:
    """The README's generated parts by the names of their markers."""
    gpu = next((run for run in found if run.gpu), None)
    host = next((run for run in found if not run.gpu), None)
    on_gpu = f"Not measured: no GPU has run bertfast yet. {WAITING}"
    if gpu is not None:
        on_gpu = (
            f"Measured on {gpu.where}. {SPREAD}\n\n{models(gpu)}\n\n{comparison(gpu)}\n\n{ops(gpu)}"
        )
        on_gpu += images(gpu)
    on_cpu = NOT_MEASURED
    if host is not None:
        how = f"one thread, processor time, load {host.environment.load} when it began"
        on_cpu = f"Measured on {host.where}; {how}. {SPREAD}\n\n{cpu(host)}{images(host)}"
    limits = budget.load()
    counts = peers.markdown(limits, limits[budget.HOT_PATHS])
    made = {"gpu": on_gpu, "cpu": on_cpu, "loss": loss(), "peers": counts}
    made["products"] = products.markdown(limits[budget.HOT_PATHS])
    return made | {"pretraining": pretrain_report.text()}


def loss(path: Path = RESULTS / "masked-lm-loss.json") -> str:
    """The memory and time of a masked language model's loss: ours, then torch's as a multiple."""
    if not path.exists():
        return NOT_MEASURED
    found = json.loads(path.read_text())
    lines = []
    for share, providers in found["shares"].items():
        mine = providers["bertfast"]
        for name, its in providers.items():
            times = f"{its['seconds']:.2f}", f"{its['peak_mib']:,.0f}"
            ratios = (f"{its[what] / mine[what]:.1f}" for what in ("seconds", "peak_mib"))
            lines.append([f"{float(share):.0%} labelled, {name}", *times, *ratios])
    device, commit = found["device"].removeprefix("cpu: "), found["bertfast_commit"]
    text = (
        f"A masked language model's loss and its gradients, of {found['tokens']:,} tokens of width "
        f"{found['width']} over {found['vocabulary']:,} words in {found['dtype']}, by "
        "`bertfast.ops.linear_cross_entropy` and by torch's `F.linear` and `F.cross_entropy`. "
        f"{device}, torch {found['torch']}, commit {commit}; one thread, processor time, load "
        f"{found['load']} when it began, median of {found['repeats']}; memory is the peak less the "
        "inputs."
    )
    heading = ["", "s", "MiB", "times as long", "times as much"]
    return f"{text}\n\n{table(heading, lines)}"


def images(run: Run) -> str:
    """The plots that lie beside the CSV."""
    if not run.path.is_relative_to(ROOT):
        return ""
    place = run.path.parent.relative_to(ROOT)
    names = {"speed-up": "Speed-up over HF SDPA", "floor": "Percent of the floor"}
    names["layer"] = "Where a layer's time goes"
    found = [
        (name, what) for name, what in names.items() if (ROOT / place / f"{name}.png").exists()
    ]
    return "".join(f"\n\n![{what}]({place.as_posix()}/{name}.png)" for name, what in found)


def filled(text: str, found: list[Run]) -> str:
    """The README's text with its generated parts replaced."""
    for name, body in parts(found).items():
        # What is between may be anything but another marker.
        begin = f"<!-- {name}: generated by benchmarks/report.py -->\n"
        pattern = rf"({re.escape(begin)})(?:(?!<!-- ).)*(<!-- end -->)"
        text, count = re.subn(
            pattern, lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"README.md must have the markers of {name!r} once, found {count}")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit status 1 if the README's tables are not those of the CSV files",
    )
    options = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    found = runs()
    text = readme.read_text()
    if options.check:
        generated = filled(text, found)
        if generated != text:
            print("README.md's tables are not those of the CSV files: run benchmarks/report.py")
        return int(generated != text)
    from bertfast.commands.bench import plots

    for run in found:
        for path in plots.draw(run.rows, run.environment, run.path.parent):
            print(path.relative_to(ROOT))
    if pretrain_report.LEARNS.exists():
        learned = json.loads(pretrain_report.LEARNS.read_text())
        pretrain_report.draw_learning(learned, pretrain_report.LEARNS.with_suffix(".png"))
    readme.write_text(filled(text, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
