"""The names in saved files. transformers renames some checkpoints' as it loads them, and back."""

import copy

import pytest
from support import hf_models
from support.hf_models import tiny

import bertfast

safetensors = pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from bertfast import hf  # noqa: E402


@pytest.mark.parametrize("prefix", hf_models.FAMILIES)
def test_a_saved_file_has_stocks_names(prefix, tmp_path):
    names = []
    for head in ("Model", "ForMaskedLM"):
        stock = tiny(prefix + head)
        masked_lm_loss = "fused" if any(map(hf.head_class, stock.modules())) else None
        model = bertfast.optimize(copy.deepcopy(stock), masked_lm_loss=masked_lm_loss)
        for one, folder in ((stock, "stock"), (model, "model")):
            one.save_pretrained(tmp_path / head / folder)
            path = tmp_path / head / folder / "model.safetensors"
            with safetensors.safe_open(path, "pt") as file:
                names.append(sorted(file.keys()))
        assert names.pop() == names.pop()
