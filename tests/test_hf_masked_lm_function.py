"""optimize(masked_lm_loss="fused") of heads that make their loss by transformers' loss_function,
which is given the arguments of a call that the head doesn't name."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from support.hf_models import KNOWN
from support.masked_lm import fused, labelled_batch, loss_and_gradients, makes_logits, same
from support.masked_lm import stock_head as any_head

from bertfast import notice
from bertfast.hf.families import modernbert

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    modernbert.FAMILY not in KNOWN, reason="this transformers has it in another form"
)


def stock_head(**config):
    return any_head("ModernBertForMaskedLM", **config)


@contextlib.contextmanager
def told(text):
    notice._told.clear()
    with pytest.warns(UserWarning, match=f"runs the original head of a .*{text}"):
        yield


def as_stock(stock, model, inputs):
    same(loss_and_gradients(model, inputs), loss_and_gradients(stock, inputs))


@pytest.mark.parametrize("count", [7, torch.tensor(7), 2.5], ids=["int", "tensor", "float"])
def test_the_items_of_a_batch(count):
    """As Trainer counts them over the batches that it accumulates."""
    stock = stock_head()
    inputs = labelled_batch(stock) | {"num_items_in_batch": count}
    model = fused(stock)
    as_stock(stock, model, inputs)
    assert not makes_logits(model, inputs)
    del inputs["num_items_in_batch"]
    assert model(**inputs).loss != model(**inputs, num_items_in_batch=count).loss


def test_another_label_is_ignored():
    stock = stock_head()
    inputs = labelled_batch(stock) | {"ignore_index": -7}
    inputs["labels"][inputs["labels"] == -100] = -7
    model = fused(stock)
    as_stock(stock, model, inputs)
    assert not makes_logits(model, inputs)


@pytest.mark.parametrize("ignored", [-100, -7])
def test_sparse_prediction(ignored):
    """The original leaves out what has no label too, before its head."""
    stock = stock_head(sparse_prediction=True, sparse_pred_ignore_index=ignored)
    inputs = labelled_batch(stock)
    inputs["labels"][inputs["labels"] == -100] = ignored
    model = fused(stock)
    with contextlib.nullcontext() if ignored == -100 else told("sparse_prediction leaves out"):
        as_stock(stock, model, inputs)
    assert makes_logits(model, inputs) == (ignored != -100)


def smoothed(source, target, *_, **__):
    return F.cross_entropy(source, target, label_smoothing=0.3)


def another(logits, labels, vocab_size, **options):
    return smoothed(logits.view(-1, vocab_size), labels.view(-1))


@pytest.mark.parametrize("where", ["the model", "the table", "the mean"])
def test_another_loss(where, monkeypatch):
    stock = stock_head()
    model, inputs = fused(stock), labelled_batch(stock)
    assert not makes_logits(model, inputs)
    utils = transformers.loss.loss_utils
    if where == "the model":
        stock.loss_function = model.loss_function = another
    elif where == "the table":
        monkeypatch.setitem(utils.LOSS_MAPPING, "ForMaskedLM", another)
    else:
        monkeypatch.setattr(utils, "fixed_cross_entropy", smoothed)
    with told("its loss_function isn't ForMaskedLMLoss as it was"):
        as_stock(stock, model, inputs)


def test_an_index_that_is_no_number():
    stock = stock_head()
    inputs = labelled_batch(stock) | {"ignore_index": torch.tensor(-100)}
    with told("ignore_index is tensor"), contextlib.suppress(TypeError):
        fused(stock)(**inputs)
