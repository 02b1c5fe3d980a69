"""`bertfast demo`: what it prints, when it calls the numbers different, what it says is missing."""

import importlib.util

import pytest
import torch

from bertfast import demo

NEEDED = all(importlib.util.find_spec(name) for name in demo.PACKAGES)
needs_extra = pytest.mark.skipif(not NEEDED, reason="the extra `demo` is not installed")


def test_texts_are_the_same_each_time_and_long_and_short():
    drawn = demo.texts(40)
    assert drawn == demo.texts(40) and len(set(drawn)) == 40
    words = [len(text.split()) for text in drawn]
    assert min(words) < 15 and max(words) > 50


@needs_extra
def test_demo_shows_numbers_time_and_a_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plot = tmp_path / "plot.png"
    threads = torch.get_num_threads()
    assert demo.demo(16, plot, seconds=0.0) == 0
    assert torch.get_num_threads() == threads
    said = capsys.readouterr().out
    assert said.count("BertLayer  fused") == 6
    for text in ("16 texts", "largest difference", "smallest cosine", "speed-up", "sorted by"):
        assert text in said
    assert said.index("Next") < said.index("bertfast bench model")
    assert plot.read_bytes().startswith(b"\x89PNG")


@needs_extra
def test_a_changed_model_is_a_fault(tmp_path, capsys, monkeypatch):
    real = demo.bertfast.optimize

    def wrong(model):
        real(model)
        with torch.no_grad():
            model.encoder.layer[3].output.dense.bias[0] += 1e-2
        return model

    monkeypatch.setattr(demo.bertfast, "optimize", wrong)
    assert demo.demo(4, tmp_path / "plot.png", seconds=0.0) == 1
    assert "further apart than rounding" in capsys.readouterr().err


def test_a_nan_is_far_apart():
    same, batch = demo.Same(), demo.Batch({"attention_mask": torch.ones(1, 2)})
    right = torch.ones(1, 2, 3), torch.ones(1, 3)
    same.add(batch, right, (right[0] * torch.nan, right[1]))
    same.add(batch, right, right)
    assert not same.ok(torch.float32)


def test_what_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGES", ("transformers", "no_such_package"))
    assert demo.demo() == 2
    said = capsys.readouterr().err
    assert "no_such_package" in said and "pip install 'bertfast[demo]'" in said
