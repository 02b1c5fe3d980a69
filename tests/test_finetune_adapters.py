"""Adapters: what is trained, what is saved, and that merging changes no number."""

import json

import pytest
import torch
from support import encoders, labelled

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
for name in ("accelerate", "sklearn", "seqeval", "pyarrow", "matplotlib"):
    pytest.importorskip(name)

from bertfast.recipes.finetune.__main__ import main, run  # noqa: E402

SMALL = "--device cpu --batch 8 --epochs 2 --task classify".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return labelled.write(tmp_path_factory.mktemp("data") / "a.csv", labelled.reviews())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoders.save(tmp_path_factory.mktemp("encoder"))


def scores(folder):
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return torch.tensor([list(json.loads(line)["scores"].values()) for line in lines])


@pytest.mark.parametrize("kind", ["lora", "adalora", "ia3"])
def test_merged_and_beside(encoder, data, tmp_path, kind):
    """The same run, saved in both ways, predicts the same; the encoder's own weights stay."""
    paths = ["--data", str(data), "--model", str(encoder), "--predict", str(data), "--peft", kind]
    assert run([*paths, *SMALL, "--out", str(tmp_path / "beside")]) == 0
    assert run([*paths, *SMALL, "--out", str(tmp_path / "merged"), "--merge"]) == 0
    # float32: the product with the sum of weights, or the sum of two products.
    torch.testing.assert_close(
        scores(tmp_path / "beside"), scores(tmp_path / "merged"), rtol=1e-4, atol=1e-5
    )
    beside, merged = (tmp_path / name / "model" for name in ("beside", "merged"))
    assert (beside / "adapter_config.json").exists() and not (beside / "config.json").exists()
    assert (merged / "config.json").exists() and not (merged / "adapter_config.json").exists()
    before = transformers.AutoModel.from_pretrained(encoder).state_dict()
    after = transformers.AutoModel.from_pretrained(merged).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("weight") for name in changed), changed
    assert not any("LayerNorm" in name or "embeddings" in name for name in changed)


def test_a_prefix(encoder, data, tmp_path, capsys):
    """It is saved beside the weights, and can't be merged."""
    paths = ["--data", str(data), "--model", str(encoder), "--predict", str(data)]
    asked = [*paths, *SMALL, "--peft", "prefix", "--out", str(tmp_path / "run")]
    with pytest.warns(UserWarning, match="runs the original code"):
        assert run(asked) == 0
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists()
    assert len(scores(tmp_path / "run")) == 60
    with pytest.raises(SystemExit) as end:
        main([*asked, "--merge"])
    assert end.value.code == 2
    assert "a prefix can't be added to weights" in capsys.readouterr().err


def test_adapters_of_tags_and_answers(encoder, tmp_path):
    for task, rows in (("tag", labelled.sentences(20)), ("qa", labelled.questions(20))):
        file = labelled.write(tmp_path / f"{task}.jsonl", rows)
        asked = ["--data", str(file), "--model", str(encoder), "--predict", str(file)]
        asked += ["--peft", "lora", "--out", str(tmp_path / task), "--rank", "4"]
        assert run([*asked, *SMALL, "--task", task]) == 0
        told = json.loads((tmp_path / task / "model" / "adapter_config.json").read_text())
        assert told["r"] == 4
