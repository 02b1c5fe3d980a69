"""`bertfast demo`: what it prints, when it calls the numbers different, what it says is missing."""

import importlib.util

import pytest
import torch

from bertfast.commands import demo
from bertfast.commands.bench.timing import Sample
from bertfast.commands.errors import UserError

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


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGES", ("transformers", "no_such_package"))
    with pytest.raises(UserError, match=r"demo needs no_such_package: pip install .*demo"):
        demo.demo()


@needs_extra
def test_the_plot_shows_padding_speed_up_and_spread(tmp_path, monkeypatch):
    from matplotlib.colors import to_rgba

    saved = []
    monkeypatch.setattr(demo.style, "save", lambda figure, path: saved.append(figure))
    monkeypatch.setattr(demo.style.need_matplotlib(), "close", lambda figure: None)
    work = {"as they come": [demo.Batch({"attention_mask": torch.tensor([[1, 1], [1, 0]])})]}
    times = {
        ("as they come", "before"): Sample(3e6, 2.9e6, 3.1e6),
        ("as they come", "after"): Sample(2e6, 1.9e6, 2.1e6),
    }
    demo.draw(tmp_path / "plot.png", times, work, "a CPU", "fp32; torch 2")
    left, right = saved[0].axes
    (tick,) = (text.get_text() for text in left.get_xticklabels())
    assert tick == "as they come\n25 % padding\n1.50 times as fast"
    blue = to_rgba(demo.style.OURS)
    before, after = (bar.get_facecolor() for bar in left.patches[:2])
    assert after == blue != before
    assert all(bar.get_facecolor() != blue for bar in right.patches)  # blue is bertfast
    assert any("fp32; torch 2" in text.get_text() for text in left.texts)
    assert left.get_ylim()[0] == 0
    table = demo._table(times, work)
    said = "\n".join(table.line(cells) for cells, _ in table.rows)
    assert "3.00 ± 0.10" in said and "2.00 ± 0.10" in said
