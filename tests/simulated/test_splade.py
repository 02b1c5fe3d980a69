"""A SparseEncoder on a GPU: its vectors, their dtype under autocast, what the host waits for."""

import copy

import pytest
import torch
from support.retrieval import PASSAGES, splade
from support.simulated_gpu import cuda, kernels, products

import bertfast

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers", reason="its encoder is tested")

DEVICE = "cuda:1"
OFF = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def given(model):
    from sentence_transformers.util import batch_to_device

    return batch_to_device(model.preprocess(PASSAGES[:4]), torch.device(DEVICE))


def vectors(model, features):
    made = model(dict(features))
    assert ("token_embeddings" in made) == (not hasattr(type(model), "_original"))
    return made["sentence_embedding"]


@pytest.mark.parametrize("packed", [True, False])
def test_the_host_waits_for_masks_alone(packed, tmp_path):
    """Once for the encoder and once for the head, before either computes; without packing never."""
    stock = splade(tmp_path, num_hidden_layers=1, **OFF).eval()
    model = bertfast.optimize(copy.deepcopy(stock), packed=packed).to(DEVICE)
    expected, features = vectors(stock, stock.preprocess(PASSAGES[:4])), given(model)
    with torch.no_grad():
        vectors(model, features)  # the first call joins weights
        before, started = cuda.waits(), len(kernels.launches)
        found = vectors(model, features)
    assert cuda.waits() - before == (2 if packed else 0), cuda.last_wait()
    assert "log1p_max_kernel" in {each.kernel for each in kernels.launches[started:]}
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_dtype_under_autocast_is_stocks(training, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "mm", products.mm)
    stock = splade(tmp_path, num_hidden_layers=1, **OFF).to(DEVICE).train(training)
    model = bertfast.optimize(copy.deepcopy(stock))
    with torch.autocast("cuda", torch.float16):
        expected, found = (vectors(one, given(one)) for one in (stock, model))
    assert found.dtype == expected.dtype == (torch.float32 if training else torch.float16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
