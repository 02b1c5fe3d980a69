"""`bertfast bench`: what it prints and writes, and what it refuses."""

import csv

import pytest
import torch

from bertfast.bench import cases, command, encoder, models
from bertfast.bench.record import COLUMNS

TINY = models.Model("tiny", 32, 64, 2, 2)
CPU = not torch.cuda.is_available()


@pytest.fixture
def directory(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    machine = command.Machine
    monkeypatch.setattr(command, "Machine", lambda *args: machine(*args, quick=True))
    TINY.build("cpu", torch.float32).save_pretrained(tmp_path / "saved")
    return tmp_path


def test_a_model_is_measured_printed_written_and_plotted(directory, capsys):
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    path = directory / "rows.csv"
    status = command.bench(
        "model",
        model=str(directory / "saved"),
        shapes="2x9",
        mix="queries",
        rows=4,
        dtype="fp32",
        passes="forward",
        csv=path,
        plot=directory / "plots",
    )
    said = capsys.readouterr().out
    assert status == 0, said
    assert torch.get_num_threads() == threads
    for text in ("saved, 2x9, forward, fp32", "saved, queries 4x", "speed-up", "left out: flash"):
        assert text in said
    assert ("need a GPU" in said) == CPU
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == COLUMNS
    timed = {(row["provider"], row["shape"].split()[0]) for row in rows if row["op"] == "saved"}
    for shape in ("2x9", "queries"):
        assert {(name, shape) for name in ("bertfast", "HF SDPA", "HF eager")} <= timed
    assert all(float(row["error"]) < 1e-5 for row in rows if row["op"] == "saved")
    assert (directory / "plots" / "speed-up.png").exists()


def test_a_layer_and_its_parts_are_measured(directory, capsys):
    options = dict(model=str(directory / "saved"), shapes="2x9", dtype="fp32", passes="forward")
    assert command.bench("layer", **options) == 0
    said = capsys.readouterr().out
    assert "saved layer, 2x9" in said and "saved layer products, 2x9" in said
    assert command.bench("layer", **options, provider=["HF eager"]) == 0
    said = capsys.readouterr().out
    assert "HF eager" in said and "HF SDPA " not in said


def test_ops_are_measured(monkeypatch, capsys, directory):
    small = [
        cases.LayerNormCase("forward", 5, 32, torch.float32),
        cases.AttentionCase("forward", 2, 9, 1, 16, torch.float32, mix="queries"),
    ]
    for name in ("cpu_cases", "all_cases"):
        monkeypatch.setattr(cases, name, lambda: small)
    assert command.bench("ops") == 0
    said = capsys.readouterr().out
    assert "layer_norm, 5x32, forward, fp32" in said and "attention_qkv, queries 2x" in said


def test_a_wrong_number_is_a_fault(directory, monkeypatch, capsys):
    monkeypatch.setattr(encoder, "limit", lambda *args, **kwargs: 0.0)
    options = dict(model=str(directory / "saved"), shapes="1x9", dtype="fp32", passes="forward")
    assert command.bench("model", **options, provider=["bertfast"]) == 1
    assert "FAULT bertfast saved forward 1x9 fp32: not timed, wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    "what, options, text",
    [
        ("kernels", {}, "must be one of ops, layer, model, got 'kernels'"),
        ("model", {"shapes": "32"}, "ROWSxLENGTH, such as 32x128, got '32'"),
        ("model", {"mix": "books"}, "a mix must be one of queries"),
        ("model", {"mix": "squad", "rows": 0}, "--rows must be at least 1, got 0"),
        ("model", {"dtype": "fp8"}, "--dtype must be of fp32, fp16, bf16, got 'fp8'"),
        ("model", {"passes": "backward"}, "--pass must be of forward"),
        ("model", {"model": "no-such-model"}, "a directory or one of BERT-base"),
        ("model", {"shapes": "2x8", "passes": "latency"}, "nothing to measure"),
        ("model", {"provider": ["HF"]}, "--provider must be of bertfast, "),
        ("layer", {"mix": "squad"}, "--mix is for a model"),
        ("ops", {"shapes": "2x8"}, "--shapes is for a layer or a model"),
        ("ops", {"dtype": "bf16"}, "no case" if CPU else None),
    ],
)
def test_bad_arguments_are_named(what, options, text, capsys):
    if text is None:
        pytest.skip("a GPU measures the ops in bf16")
    if what != "ops":
        pytest.importorskip("transformers")
    assert command.bench(what, **options) == 2
    assert text in capsys.readouterr().err
