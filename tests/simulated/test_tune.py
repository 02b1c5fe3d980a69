"""`bertfast tune` as a command, with a clock by which Triton is twice as fast."""

import json

import pytest
import torch

import bertfast
from bertfast.commands import tune as tuning
from bertfast.commands.bench import models
from bertfast.commands.env import describe
from bertfast.ops import dispatch, tuned
from bertfast.ops.attention import config


def test_it_measures_and_auto_follows(tmp_path, monkeypatch, capsys):
    file = tmp_path / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    tuned.forget()
    device = torch.device("cuda", 0)
    case = (torch.bfloat16, 32)
    with pytest.warns(UserWarning, match="finds no file"):
        assert dispatch.choose("layer_norm", "auto", device, *case) == "cuda"

    tiny = models.Model("tiny", 32, 64, 1, 2)
    monkeypatch.setattr(tuning, "_models", lambda given: [tiny])
    # All of it would take the interpreter a minute.
    monkeypatch.setattr(config, "PASSES", ("forward",))
    candidates = config.candidates
    monkeypatch.setattr(config, "candidates", lambda split: candidates(split)[:2])
    launches = []
    forward = dispatch.backend_module("layer_norm", "triton").forward
    monkeypatch.setattr(
        dispatch.backend_module("layer_norm", "triton"),
        "forward",
        lambda *arguments: launches.append(1) or forward(*arguments),
    )

    def clock(steps, stream):
        count = len(launches)
        for step in steps:
            step()
        time = 1.0 if len(launches) > count else 2.0
        return lambda: time

    monkeypatch.setattr(tuning, "graph_timer", clock)
    monkeypatch.setattr(tuning, "input_sets", lambda size: (1, "warm"))
    assert tuning.tune(shapes="2x20", dtype=["bf16"], minutes=5) == 0

    kept = json.loads(file.read_text())
    assert kept["about"]["gpu"] == torch.cuda.get_device_name()
    assert kept["backends"]["layer_norm bfloat16 32"]["chosen"] == "triton"
    assert kept["backends"]["attention bfloat16 16 64"]["chosen"] == "cuda"  # as fast: the usual
    assert "forward 16-bit D16 length64" in kept["splits"]
    assert "layer_norm bfloat16 32" in capsys.readouterr().out
    assert dispatch.choose("layer_norm", "auto", device, *case) == "triton"
    assert describe()["auto"]["backends"]["layer_norm bfloat16 32"] == "triton"

    launches.clear()
    layer = bertfast.nn.EncoderLayer(32, 2, 64).to(device, torch.bfloat16)
    layer(torch.randn(2, 20, 32, device=device, dtype=torch.bfloat16))
    assert len(launches) == 2
    monkeypatch.undo()
    tuned.forget()
