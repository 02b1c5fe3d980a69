"""sentence-transformers' CrossEncoder with a classification head of every family: packed, and with
the stock model's scores and ranks."""

import copy

import numpy as np
import pytest
import torch
from support import encoders
from support.hf_models import FAMILIES, rows_seen, tiny
from support.retrieval import PASSAGES, QUERIES

import bertfast
from bertfast.testing.model import HIDDEN_ATOL

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("sentence_transformers", reason="its encoder is tested")

NAMES = [
    name
    for name in (f"{prefix}ForSequenceClassification" for prefix in FAMILIES)
    if hasattr(transformers, name)
]
PAIRS = list(zip(QUERIES, PASSAGES, strict=True)) + [("a b", "x " * 30), ("h", "h")]


def reranker(folder, name, **config):
    sizes = {"num_labels": 1, "type_vocab_size": 2, "pad_token_id": 0}
    tiny(name, **(sizes | config)).save_pretrained(folder)
    encoders.save_tokenizer(folder)
    return library.CrossEncoder(str(folder), device="cpu")


def both(*given, **config):
    stock = reranker(*given, **config)
    return stock, bertfast.optimize(copy.deepcopy(stock), strict=True)


def close(found, expected):
    """Logits: as sums of hidden states by weights of some 0.1 in size, sqrt(64) of them."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=HIDDEN_ATOL)


def predicted(model, pairs=PAIRS, **options):
    """The scores, and the rows that each layer saw."""
    found = []
    shapes = rows_seen(lambda: found.append(model.predict(pairs, **options)), {})
    return found[0], {rows for rows, _ in shapes}


MEAN = {"classifier_pooling": "mean"}


@pytest.mark.parametrize(
    "name, config", [*((n, {}) for n in NAMES), ("ModernBertForSequenceClassification", MEAN)]
)
def test_scores_and_ranks_are_stocks(name, config, tmp_path):
    if name not in NAMES:
        pytest.skip("this transformers has it in another form")
    stock, model = both(tmp_path, name, **config)
    logits = dict(activation_fn=torch.nn.Identity())
    expected = stock.predict(PAIRS, **logits)
    found, rows = predicted(model, **logits)
    assert rows == {1}  # all of them packed
    assert expected.std() > 100 * HIDDEN_ATOL  # scores that tell pairs apart
    close(found, expected)
    close(predicted(model, batch_size=3)[0], stock.predict(PAIRS))
    ranks, ours = (one.rank("a b c", PASSAGES) for one in (stock, model))
    assert [rank["corpus_id"] for rank in ours] == [rank["corpus_id"] for rank in ranks]
    close([rank["score"] for rank in ours], [rank["score"] for rank in ranks])


@pytest.mark.parametrize("name", ["BertForSequenceClassification", NAMES[-1]])
def test_several_labels(name, tmp_path):
    stock, model = both(tmp_path, name, num_labels=3)
    expected = stock.predict(PAIRS, apply_softmax=True)
    found, rows = predicted(model, apply_softmax=True)
    assert rows == {1} and found.shape == (len(PAIRS), 3)
    close(found, expected)
    model.save(str(tmp_path / "saved"))
    again = library.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    close(again.predict(PAIRS, apply_softmax=True), expected)
    bertfast.revert(model)
    assert (model.predict(PAIRS, apply_softmax=True) == expected).all()
