"""`bertfast bench`: what it prints and writes, and what it refuses."""

import csv
import json
import re

import pytest
import torch

from bertfast.commands import saved
from bertfast.commands.bench import cases, command, encoder, harness, models
from bertfast.commands.bench.cases.attention_qkv import AttentionQKVCase
from bertfast.commands.bench.cases.layer_norm import LayerNormCase
from bertfast.commands.bench.record import COLUMNS
from bertfast.commands.errors import UserError

TINY = models.Model("tiny", 32, 64, 2, 2)
CPU = not torch.cuda.is_available()


@pytest.fixture
def directory(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    machine = command.Machine
    monkeypatch.setattr(command, "Machine", lambda *args: machine(*args, quick=True))
    TINY.build("cpu", torch.float32).save_pretrained(tmp_path / "tiny-bert" / "model")
    return tmp_path


def test_a_model_is_measured_printed_written_and_plotted(directory, capsys):
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    path = directory / "rows.csv"
    status = command.bench(
        "model",
        model=str(directory / "tiny-bert" / "model"),
        shapes="2x9",
        mix=["queries"],
        rows=4,
        dtype=["fp32"],
        passes=["forward"],
        csv=path,
        plot=directory / "plots",
    )
    said = capsys.readouterr().out
    assert status == 0, said
    assert torch.get_num_threads() == threads
    assert said.count("tiny-bert; speed-up over HF SDPA") == 1  # one table for all its cases
    for text in ("\n2x9, forward, fp32\n", "\nqueries 4x", "% padding", "left out: flash"):
        assert text in said
    assert re.search(r"^bertfast is [\d.]+ ± [\d.]+ times as fast as HF SDPA$", said, re.M)
    assert re.search(r"^  geometric mean of 2; worst [\d.]+ ± [\d.]+: (2x9|queries)", said, re.M)
    lines = [line for line in said.splitlines() if str(directory) not in line]
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in said
    assert ("need a GPU" in said) == CPU
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == COLUMNS
    timed = {(row["provider"], row["shape"].split()[0]) for row in rows if row["op"] == "tiny-bert"}
    for shape in ("2x9", "queries"):
        assert {(name, shape) for name in ("bertfast", "HF SDPA", "HF eager")} <= timed
    assert all(float(row["error"]) < 1e-5 for row in rows if row["op"] == "tiny-bert")
    assert (directory / "plots" / "speed-up.png").exists()


def test_a_layer_and_its_parts_are_measured(directory, capsys):
    options = dict(
        model=str(directory / "tiny-bert" / "model"),
        shapes="2x9",
        dtype=["fp32"],
        passes=["forward"],
    )
    assert command.bench("layer", **options) == 0
    said = capsys.readouterr().out
    assert "tiny-bert layer; speed-up" in said and "tiny-bert layer products; speed-up" in said
    assert command.bench("layer", **options, provider=["HF eager"]) == 0
    said = capsys.readouterr().out
    assert "HF eager" in said and "HF SDPA " not in said


def test_ops_are_measured(monkeypatch, capsys, directory):
    small = [
        LayerNormCase("forward", 5, 32, torch.float32),
        AttentionQKVCase("forward", models.mixed_batch("queries", 2), 1, 16, torch.float32),
    ]
    for name in ("cpu_cases", "gpu_cases"):
        monkeypatch.setattr(cases, name, lambda: small)
    assert command.bench("ops") == 0
    said = capsys.readouterr().out
    assert "layer_norm; speed-up over torch eager" in said and "attention_qkv; speed" in said
    assert "\n5x32, forward, fp32\n" in said and "\nqueries 2x" in said


def test_a_wrong_number_is_a_fault(directory, monkeypatch, capsys):
    monkeypatch.setattr(encoder, "limit", lambda *args, **kwargs: 0.0)
    options = dict(
        model=str(directory / "tiny-bert" / "model"),
        shapes="1x9",
        dtype=["fp32"],
        passes=["forward"],
    )
    assert command.bench("model", **options, provider=["bertfast"]) == 1
    assert "FAULT bertfast tiny-bert forward 1x9 fp32: not timed, wrong" in capsys.readouterr().out


@pytest.mark.skipif(not CPU, reason="a GPU measures the ops in bf16")
def test_a_dtype_without_a_case_is_named():
    with pytest.raises(UserError, match="--dtype: no case of the ops has bf16"):
        command.bench("ops", dtype=["bf16"])


@pytest.mark.skipif(not CPU, reason="a GPU runs it")
def test_nothing_measured_is_no_success(directory):
    with pytest.raises(UserError, match="nothing was measured: bertfast graph: it needs a GPU"):
        command.bench("model", shapes="1x9", provider=["bertfast graph"])


def test_rows_are_kept_when_it_is_interrupted(directory, monkeypatch):
    def interrupted(self, case):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.Bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.bench("model", shapes="1x9", csv=directory / "rows.csv")
    with (directory / "rows.csv").open(newline="") as file:
        assert [row["op"] for row in csv.DictReader(file)] == ["copy"]


@pytest.mark.parametrize(
    "path, written, name",
    [
        ("e5-small/model", None, "e5-small"),
        ("e5-small/checkpoint-500", "", "e5-small"),
        ("e5-small", "/home/somebody/out", "e5-small"),
        ("e5-small/model", "nreimers/MiniLM-L6-H384-uncased", "MiniLM-L6-H384-uncased"),
    ],
)
def test_a_model_is_called_by_its_own_name(tmp_path, path, written, name):
    (tmp_path / path).mkdir(parents=True)
    config = {} if written is None else {"_name_or_path": written}
    (tmp_path / path / "config.json").write_text(json.dumps(config))
    assert saved.name(str(tmp_path / path)) == name
