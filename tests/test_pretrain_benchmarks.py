"""The scripts behind the README's figures of pre-training: committed figures meet the goals, and
all of them run."""

import json
from pathlib import Path

import pytest
from support.scripts import imported

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks/ is not here")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
NAMES = "pretrain_learns", "pretrain_speed", "pretrain_modelled", "pretrain_report", "python_text"


@pytest.fixture(scope="module")
def scripts():
    with imported(*NAMES) as found:
        yield found


# The committed figures


def test_a_small_bert_learned(scripts):
    report, script = scripts["pretrain_report"], scripts["pretrain_learns"]
    learned = json.loads(report.LEARNS.read_text())
    assert report.meets(learned)
    assert learned["goals"] == script.GOALS
    settings = learned["settings"]
    assert settings.items() >= {**script.MODEL, "vocabulary": 4096, "seconds": 300.0}.items()
    assert learned["environment"]["threads"] == 2
    assert not learned["environment"]["bertfast_commit"].endswith("modified")
    assert [run["seed"] for run in learned["runs"]] == [0, 1, 2]
    for run in learned["runs"]:
        assert run["seconds"] < 1.1 * settings["seconds"]
        assert len(run["held_out_curve"]) >= 2 and run["curve"][-1][0] == run["steps"]
    assert report.LEARNS.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "missed", [{"mlm_loss": 5.01}, {"nsp_accuracy": 0.549}, {"pairs": 1999}, {}], ids=str
)
def test_a_goal_that_one_seed_misses_is_seen(scripts, missed):
    met = {"unigram_cross_entropy": 5.2, "mlm_loss": 4.99, "nsp_accuracy": 0.56, "pairs": 2000}
    runs = [{"held_out": met}, {"held_out": met | missed}]
    learned = {"goals": scripts["pretrain_learns"].GOALS, "runs": runs}
    assert scripts["pretrain_report"].meets(learned) == (not missed)


def test_the_recipe_is_faster_than_trainer(scripts):
    script = scripts["pretrain_speed"]
    found = json.loads(script.RESULT.read_text())
    goals = found["goals"]
    assert goals == script.GOALS
    assert not found["environment"]["bertfast_commit"].endswith("modified")
    assert [one["dropout"] for one in found["measured"]] == [0.1, 0.0]
    for one in found["measured"]:
        assert one["over_trainer"]["paragraphs"]["median"] >= goals["over_trainer"]
        for way in one["ways"].values():
            assert len(way["turns"]) == found["settings"]["turns"] >= 3
        steps = [way["tokens_per_step"] for way in one["ways"].values()]
        assert max(steps) < 1.1 * min(steps)  # as many real tokens a step


def test_what_is_modelled_is_modelled_so(scripts):
    found = json.loads(scripts["pretrain_speed"].RESULT.read_text())
    assert found["modelled"] == scripts["pretrain_modelled"].h100()
    assert found["modelled"]["tokens_per_second"] >= found["goals"]["modelled_tokens_per_second"]
    assert "not measured" in found["modelled"]["what"]


def test_the_readme_quotes_them(scripts):
    text = scripts["pretrain_report"].text()
    assert text in (ROOT / "README.md").read_text(), "run benchmarks/report.py"
    assert "pretrain-learns.png" in text and "Modelled" in text


# The scripts


def test_the_text(scripts, tmp_path):
    python_text = scripts["python_text"]
    path = tmp_path / "text.jsonl"
    about = python_text.write(path, 60_000)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert about["documents"] == len(texts) and about["characters"] == sum(map(len, texts))
    assert about == python_text.write(path, 60_000)
    assert list(python_text.docstrings(Path(json.__file__)))[0].startswith("JSON (JavaScript")


def test_a_few_seconds_of_learning(scripts, tmp_path, monkeypatch):
    script, out = scripts["pretrain_learns"], tmp_path / "learned.json"
    monkeypatch.setattr(script, "VOCABULARY", 400)
    monkeypatch.setattr(script, "MODEL", {"layers": 1, "width": 32, "heads": 2})
    words = ["--seconds", "3", "--seeds", "4", "--characters", "60000", "--pairs", "30"]
    assert script.main([*words, "--out", str(out)]) == 1  # which can't meet the goals
    learned = json.loads(out.read_text())
    (run,) = learned["runs"]
    assert run["seed"] == 4 and run["steps"] > run["stopped_after"] > 0
    assert run["held_out"]["pairs"] >= 30 and out.with_suffix(".png").exists()
    assert run["curve"][-1][0] == run["steps"]
    text = scripts["pretrain_report"].learning(out)
    assert "1 layers of width 32" in text


def test_a_few_steps_of_speed(scripts, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    script, out = scripts["pretrain_speed"], tmp_path / "speed.json"
    monkeypatch.setattr(script, "VOCABULARY", 400)
    for name, value in {"LAYERS": 1, "WIDTH": 32, "HEADS": 2, "TOKENS": 256}.items():
        monkeypatch.setattr(script, name, value)
    words = ["--steps", "5", "--turns", "1", "--characters", "60000", "--out", str(out)]
    assert script.main(words) == 0
    found = json.loads(out.read_text())
    first, _ = found["measured"]
    assert first["ways"].keys() == set(script.WAYS)
    assert first["ways"]["Trainer, paragraphs"]["useful"] < 0.9
    assert first["ways"]["Trainer, documents"]["useful"] == 1.0
    text = scripts["pretrain_report"].speed(out)
    assert f"{first['ways']['recipe, documents']['tokens_per_second']:,}" in text
