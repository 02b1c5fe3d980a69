"""The README's performance tables are what benchmarks/report.py makes of the committed files."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bertfast.commands import terminal
from bertfast.commands.bench import compare, plots, style, tables
from bertfast.commands.bench.providers import TABLE
from bertfast.commands.bench.record import ADDED, COLUMNS, Environment, Recorder, Row

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "report.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks/ is not here")


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("bertfast_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_readme_is_generated(report):
    text = (ROOT / "README.md").read_text()
    assert report.filled(text, report.runs()) == text, "run benchmarks/report.py"


def test_committed_files_have_the_schema(report):
    older = [name for name in COLUMNS if name not in ADDED]
    for run in report.runs():
        assert run.path.read_text().splitlines()[0] in (",".join(COLUMNS), ",".join(older))
        assert run.environment.bertfast_commit != "unknown"


GPU = Environment("NVIDIA X", "1.2", "2.13.0", "3.7.1", "5.23.0", "13.0", "3.11", "0.1", "abc")
CPU = Environment("cpu: Some CPU", "", "2.13.0", "3.7.1", "5.23.0", "", "3.11", "0.1", "abc")


def write(directory, environment, rows):
    directory.mkdir()
    recorder = Recorder(directory / "results.csv", environment)
    for row in rows:
        recorder.add(row)


def row(provider, op, shape, us, pass_="forward", dtype="bf16", **more):
    found = Row(provider, op, pass_, shape, dtype, median_us=us, **more)
    if us is not None:
        found.p20_us, found.p80_us = 0.99 * us, 1.01 * us
        found.percent_of_floor = 100 * 50.0 / us
    return found


def test_tables_of_rows(report, tmp_path):
    more = {"tokens_per_s": 1e6, "padded_tokens_per_s": 2e6, "error": 1e-3}
    write(
        tmp_path / "gpu",
        GPU,
        [
            row("bertfast", "BERT-base", "squad 64x307", 100.0, **more),
            row("bertfast graph", "BERT-base", "squad 64x307", 80.0, **more),
            row("HF SDPA", "BERT-base", "squad 64x307", 240.0, **more),
            row("torch compile", "BERT-base", "squad 64x307", None, note="not timed: it failed"),
            row("bertfast triton", "layer_norm", "16384x768", 62.5),
            row("torch eager", "layer_norm", "16384x768", 125.0),
            row("bertfast triton", "attention_qkv", "squad 64x307x12x64 rotary", 3.0),
            row("bertfast triton", "attention_qkv", "squad 64x307x12x64", 77.0),
            row("bertfast cuda", "attention_qkv", "32x512x12x64 rotary", 88.0),
        ],
    )
    write(
        tmp_path / "cpu",
        CPU,
        [
            row("bertfast", "MiniLM-L6", "squad 8x300", 100.0, dtype="fp32", **more),
            row("HF SDPA", "MiniLM-L6", "squad 8x300", 250.0, dtype="fp32", **more),
        ],
    )
    found = report.runs(tmp_path)
    parts = report.parts(found)
    assert "Measured on NVIDIA X, torch 2.13.0, triton 3.7.1" in parts["gpu"]
    assert "commit abc" in parts["gpu"] and "Some CPU" in parts["cpu"]
    (line,) = (x for x in parts["gpu"].splitlines() if "BERT-base squad, forward |" in x)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # The fastest of ours; a provider without a time is not measured, and neither is an absent one.
    assert cells[1:5] == ["80.0 ± 0.8", "62", "not measured", "3.00 ± 0.04"]
    assert cells[6] == "not measured"
    (line,) = (x for x in parts["gpu"].splitlines() if "layer_norm 16384x768, forward" in x)
    assert "62.5 ± 0.6 | 80 | torch eager, 125 ± 1 | 40" in line
    # A mix is that of BERT's own attention, and positions' cases have lines of their own.
    for name, time in (("squad", "77.0"), ("32x512x12x64 rotary", "88.0")):
        (line,) = (x for x in parts["gpu"].splitlines() if f" attention_qkv {name}, forw" in x)
        assert f"| {time} ±" in line
    heading = "|  | bertfast, us | % of floor | the best other, us | % of floor |"
    assert heading in parts["gpu"]
    (line,) = (x for x in parts["cpu"].splitlines() if "MiniLM-L6 squad" in x)
    assert "2.50 ± 0.04 | not measured | 2.00 | 50 | 1.0e-03" in line
    assert "- MiniLM-L6: bertfast is 2.50 ± 0.04 times as fast as HF SDPA\n" in parts["cpu"] + "\n"
    assert "- BERT-base: bertfast is 2.40 ± 0.03 times as fast as HF SDPA" in parts["gpu"]


def test_nothing_measured_is_said(report, tmp_path):
    parts = report.parts(report.runs(tmp_path))
    assert parts["gpu"].startswith("Not measured: no GPU has run bertfast yet.")
    assert parts["cpu"] == "not measured"
    write(tmp_path / "gpu", GPU, [row("torch eager", "layer_norm", "16384x768", 125.0)])
    lines = report.parts(report.runs(tmp_path))["gpu"].splitlines()
    (line,) = (x for x in lines if "BERT-base 32x512, forward |" in x)
    assert line.count("not measured") == 2 + len(report.OTHERS)
    (line,) = (x for x in lines if "layer_norm 16384x768, forward" in x)
    assert line.count("not measured") == 2


def test_only_what_is_between_the_markers_changes(report, tmp_path):
    text = "".join(
        f"before\n<!-- {name}: generated by benchmarks/report.py -->\nold\n<!-- end -->\nafter\n"
        for name in ("gpu", "cpu", "loss", "peers", "products", "pretraining")
    )
    new = report.filled(text, [])
    assert "old" not in new and new.count("before") == new.count("after") == 6
    assert report.filled(new, []) == new
    with pytest.raises(ValueError, match="markers of 'gpu'"):
        report.filled("nothing", [])


LAYER = [
    row(provider, f"BERT-base layer {kind}", "32x512", factor * 9000.0)
    for provider, factor in (("bertfast", 1.2), ("HF SDPA", 1.0))
    for kind in style.KINDS
]
MANY = [
    *(
        row(provider, "BERT-base", "squad 64x384", us, tokens_per_s=1e6, padded_tokens_per_s=2e6)
        for provider, us in (("bertfast", 2e5), ("bertfast padded", 3e5), ("HF SDPA", 1.8e5))
    ),
    row("bertfast triton", "layer_norm", "16384x768", 62.5),
    row("torch eager", "layer_norm", "16384x768", 50.5),
    *LAYER,
]


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """The plots that were drawn, by the files' names."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.update({path.stem: figure}))
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    plots.draw(MANY, GPU, tmp_path)
    return drawn


def colours(axes):
    from matplotlib.colors import to_hex

    return {to_hex(bar.get_facecolor()) for bar in axes.patches}


def said(axes):
    return [text.get_text() for text in axes.texts]


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    paths = plots.draw(MANY, GPU, tmp_path)
    assert [path.name for path in paths] == ["speed-up.png", "floor.png", "layer.png"]
    first = [path.read_bytes() for path in paths]
    assert all(data.startswith(b"\x89PNG") for data in first)
    plots.draw(MANY, GPU, tmp_path)
    assert [path.read_bytes() for path in paths] == first
    assert plots.draw([], GPU, tmp_path) == []


def test_each_provider_has_one_colour_and_blue_is_ours(figures):
    assert len({(provider.name, provider.color) for provider in TABLE}) == len(style.PROVIDERS)
    for name, colour in style.PROVIDERS.items():
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert (blue > max(red, green) + 50) == name.startswith("bertfast"), name
    (axes,) = figures["speed-up"].axes
    assert colours(axes) == {style.PROVIDERS[p] for p in ("bertfast", "bertfast padded", "HF SDPA")}
    (axes,) = figures["layer"].axes
    assert colours(axes) == set(style.KINDS.values())


def test_plots_begin_at_zero_and_show_losses_spread_and_what_they_were_measured_with(figures):
    for name, loss in (
        ("speed-up", "0.90 ± 0.01 (slower)"),
        ("floor", "80 %  bertfast triton (slower)"),
        ("layer", "32.4 ms (slower)"),
    ):
        (axes,) = figures[name].axes
        assert axes.get_xlim()[0] == 0
        assert loss in said(axes)
        assert axes.containers and axes.collections  # error bars
        caption = said(axes)[-1].replace("\n", " ")
        for text in ("NVIDIA X", "GPU time", "bf16", "torch 2.13.0", "commit abc", "Thin bars"):
            assert text in caption
        # What is written stands where no bar and no line is.
        for text in axes.texts[:-1]:
            assert text.get_position()[0] > 1
        assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1
    (axes,) = figures["speed-up"].axes
    (tick,) = axes.get_yticklabels()
    assert tick.get_text() == "BERT-base  squad 64x384, 50 % padding\nforward"
    (axes,) = figures["layer"].axes
    assert axes.get_xlim()[1] > 120  # bertfast's bar is as long as it is


def test_tables_have_80_columns_one_unit_and_no_zero_that_rounding_made():
    rows = [
        row(
            name,
            "BERT-large",
            "wikipedia 64x512",
            us,
            "forward+backward",
            tokens_per_s=123456.0,
            padded_tokens_per_s=2e5,
            peak_memory_mb=65536.0,
            error=1.2e-3,
            dropout=0.1,
        )
        for name, us in (("bertfast", 1234567.0), ("nn.TransformerEncoder", 1345678.0))
    ]
    rows += [
        row("HF SDPA", "BERT-large", "1x128", 412.0, tokens_per_s=1e5, padded_tokens_per_s=1e5),
        row("bertfast", "BERT-large", "1x128", 512.0, tokens_per_s=1e5, padded_tokens_per_s=1e5),
        row("torch compile", "BERT-large", "1x128", None, note="not timed: " + "it failed " * 20),
    ]
    rows[-2].p20_us, rows[-2].p80_us = 511.999, 512.001
    ((op, cases),) = tables.by_op(rows).items()
    table = tables.op_table(op, cases)
    table.fit()
    lines = [line for cells, _ in table.rows for line in table.line(cells).splitlines()]
    assert max(map(len, lines)) <= 80
    assert table.columns[1].heading == "median ms"
    text = "\n".join(lines)
    assert "1234.567 ± 12.346" in text and "0.512 ± <0.001" in text
    assert "1x128, forward, bf16\n  HF SDPA" in text and "torch compile: not timed" in text
    losing = next(style for cells, style in table.rows if "0.80" in cells)
    assert losing == terminal.BAD
    assert "50 % padding" not in text and "38 % padding" in text


def test_a_sentence_compares_and_tells_the_worst_case():
    rows = [
        row(name, "layer_norm", shape, us)
        for shape, times in {"1x128": (100, 95, 300), "32x512": (100, 190, 600)}.items()
        for name, us in zip(("bertfast cuda", "torch eager", "Liger"), times, strict=True)
    ]
    rows += [row("bertfast triton", "layer_norm", "1x128", 200.0)]
    lines = compare.verdicts(compare.grouped(rows))
    assert lines == [
        # sqrt(0.95 * 1.9); each spread is 1 %, four of them over two cases
        "bertfast cuda is 1.34 ± 0.01 times as fast as torch eager",
        "  geometric mean of 2; worst 0.95 ± 0.01: 1x128, forward",
        "bertfast cuda is 4.24 ± 0.04 times as fast as Liger",
        "  geometric mean of 2; worst 3.00 ± 0.04: 1x128, forward",
        "bertfast triton is 0.47 ± 0.01 times as fast as torch eager",
    ]


def test_the_masked_lm_loss(report, tmp_path):
    assert report.loss(tmp_path / "none.json") == "not measured"
    providers = {
        "bertfast": {"seconds": 2.0, "peak_mib": 200.0},
        "torch": {"seconds": 9.0, "peak_mib": 5000.0},
    }
    facts = dict(tokens=16384, width=768, vocabulary=30522, dtype="float32", repeats=3)
    facts |= dict(device="cpu: Some CPU", torch="2.13.0", bertfast_commit="abc", load="1.5")
    path = tmp_path / "loss.json"
    path.write_text(json.dumps(facts | {"shares": {"0.15": providers}}))
    text = report.loss(path)
    assert "of 16,384 tokens of width 768 over 30,522 words" in text and "Some CPU" in text
    assert "| 15% labelled, torch | 9.00 | 5,000 | 4.5 | 25.0 |" in text


def test_the_measured_loss_reaches_its_goals(report):
    """At 15 % a fifth of plain torch's memory or less, and a fourth of its time."""
    found = json.loads((report.RESULTS / "masked-lm-loss.json").read_text())
    assert (found["tokens"], found["vocabulary"]) == (16384, 30522)
    providers = found["shares"]["0.15"]
    mine, stock = providers["bertfast"], providers["torch, all tokens"]
    assert stock["peak_mib"] >= 5 * mine["peak_mib"] and stock["seconds"] >= 4 * mine["seconds"]
