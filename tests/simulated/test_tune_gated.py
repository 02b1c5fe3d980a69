"""`bertfast tune` of gated MLPs: one kernel or two, and the op after a product; a layer follows."""

import json

import pytest
import torch
from test_layer_gated import GatedLayer

from bertfast.commands import tune as tuning
from bertfast.commands.bench import models
from bertfast.ops import dispatch, tuned
from bertfast.ops.linear import limits

TINY = models.Model("tiny", 32, 64, 1, 2, gated="silu")
BF16 = torch.bfloat16
# Of a step in which Triton's kernels were called; of others 2.
TIMES = {"gated forward": 1.5, "gated backward": 1.5}
TIMES |= {"linear_gated forward": 1.0, "linear_gated backward": 2.0}


@pytest.fixture
def triton_calls(monkeypatch):
    """The names of Triton's calls, op and pass."""
    calls = []
    for op in ("gated", "linear_gated"):
        module = dispatch.backend_module(op, "triton")
        for name in ("forward", "backward"):
            real, called = getattr(module, name), f"{op} {name}"

            def call(*given, real=real, called=called):
                calls.append(called)
                real(*given)

            monkeypatch.setattr(module, name, call)
    return calls


def test_it_decides_and_a_layer_follows(tmp_path, monkeypatch, triton_calls):
    """One kernel is the fastest forward, and two are the faster backward, both in Triton."""
    file = tmp_path / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    tuned.forget()
    monkeypatch.setattr(tuning, "_models", lambda given: [TINY])
    monkeypatch.setattr(limits, "ROWS", (64,))  # all of it would take the interpreter a minute
    decisions = tuning.decisions

    def gated_only(*given):
        return [made for made in decisions(*given) if "gated" in made.key]

    monkeypatch.setattr(tuning, "decisions", gated_only)

    def clock(steps, stream):
        triton_calls.clear()
        for step in steps:
            step()
        time = min(map(TIMES.get, triton_calls), default=2.0)
        return lambda: time

    monkeypatch.setattr(tuning, "graph_timer", clock)
    monkeypatch.setattr(tuning, "input_sets", lambda size: (1, "warm"))
    assert tuning.tune(shapes="2x20", dtype=["bf16"], minutes=5) == 0
    kept = json.loads(file.read_text())["backends"]
    assert {key: found["chosen"] for key, found in kept.items()} == {
        "gated bfloat16": "triton",
        "linear_gated bfloat16 32 64 64": "triton",
        "linear_gated bfloat16 32 64 64 backward": "torch",
    }
    us = {"two kernels": 3.0, "cuda": 4.0, "triton": 2.0}
    assert kept["linear_gated bfloat16 32 64 64"]["us"] == us

    device = torch.device("cuda", 0)
    assert dispatch.choose("gated", "auto", device, BF16) == "triton"
    for two in (True, False):
        layer = GatedLayer("silu", two, True, attention_dropout=0.0, dropout=0.0)
        layer = layer.to(device, BF16)
        x = torch.randn(2, 20, 32, device=device, dtype=BF16)
        triton_calls.clear()
        y = layer(x)
        assert triton_calls == ["linear_gated forward"]
        y.sum().backward()
        assert triton_calls == ["linear_gated forward", "gated backward"]
    monkeypatch.undo()
    tuned.forget()
