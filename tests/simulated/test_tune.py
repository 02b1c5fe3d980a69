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
from bertfast.ops.linear import limits


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
    monkeypatch.setattr(limits, "ROWS", (64,))
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
    gelus = []
    module = dispatch.backend_module("linear_gelu", "triton")
    for name in ("forward", "backward"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real: gelus.append(1) or real(*given))

    def clock(steps, stream):
        count = len(launches) + len(gelus)
        for step in steps:
            step()
        time = 1.0 if len(launches) + len(gelus) > count else 2.0
        return lambda: time

    monkeypatch.setattr(tuning, "graph_timer", clock)
    monkeypatch.setattr(tuning, "input_sets", lambda size: (1, "warm"))
    assert tuning.tune(shapes="2x20", dtype=["bf16"], minutes=5) == 0

    kept = json.loads(file.read_text())
    assert kept["about"]["gpu"] == torch.cuda.get_device_name()
    assert kept["backends"]["layer_norm bfloat16 32"]["chosen"] == "triton"
    assert kept["backends"]["attention bfloat16 16 64"]["chosen"] == "cuda"  # as fast: the usual
    assert "forward 16-bit D16 length64" in kept["splits"]
    for pass_ in ("", " backward"):
        found = kept["backends"][f"linear bfloat16 32 64 64{pass_}"]
        assert found["chosen"] == "triton"
        slow, fast = (2.0, 1.0) if pass_ else (4.0, 2.0)  # inference and training
        assert found["us"] == {"two kernels": slow, "cuda": slow, "triton": fast}
    assert "layer_norm bfloat16 32" in capsys.readouterr().out
    assert dispatch.choose("layer_norm", "auto", device, *case) == "triton"
    assert describe()["auto"]["backends"]["layer_norm bfloat16 32"] == "triton"

    launches.clear()
    layer = bertfast.nn.EncoderLayer(32, 2, 64).to(device, torch.bfloat16)
    layer(torch.randn(2, 20, 32, device=device, dtype=torch.bfloat16))
    assert len(launches) == 2
    gelus.clear()
    x = torch.randn(40, 32, device=device, dtype=torch.bfloat16)
    y = layer(x.view(2, 20, 32))
    assert len(gelus) == 1
    y.sum().backward()
    assert len(gelus) == 2
    monkeypatch.undo()
    tuned.forget()
