"""Heads of masked language models without logits, on a device that is not the current one."""

import copy

import pytest
from support.masked_lm import fused, labelled_batch, loss_and_gradients, same, stock_head
from support.simulated_gpu import cuda

pytest.importorskip("transformers")

DEVICE = "cuda:1"


@pytest.mark.parametrize("name", ["BertForPreTraining", "RobertaForMaskedLM"])
def test_numbers_and_waits(name):
    """A batch without padding: the host waits for the number of labels, and for nothing else."""
    stock = stock_head(name, num_hidden_layers=1).to(DEVICE)
    inputs = {n: v.to(DEVICE) for n, v in labelled_batch(stock, (9, 9)).items()}
    del inputs["attention_mask"]
    model = fused(stock, backend="torch")
    before = cuda.waits()
    model(**inputs).loss.backward()
    assert cuda.waits() == before + 1, cuda.last_wait()
    same(loss_and_gradients(model, inputs), loss_and_gradients(stock, inputs))


def test_labels_on_the_host():
    """RoBERTa's heads move them; then there is nothing to wait for. BERT's have an error."""
    stock = stock_head("RobertaForMaskedLM", num_hidden_layers=1).to(DEVICE)
    inputs = {n: v.to(DEVICE) for n, v in labelled_batch(stock, (9, 9)).items()}
    del inputs["attention_mask"]
    inputs["labels"] = inputs["labels"].cpu()
    model = fused(stock, backend="torch")
    before = cuda.waits()
    assert model(**inputs).logits is None
    assert cuda.waits() == before, cuda.last_wait()
    same(loss_and_gradients(model, inputs), loss_and_gradients(stock, inputs))
    bert = stock_head(num_hidden_layers=1).to(DEVICE)
    for one in (copy.deepcopy(bert), fused(bert)):
        with pytest.raises(RuntimeError):
            one(**inputs)


def test_in_a_capture():
    """Nothing waits, so all tokens take part."""
    stock = stock_head(num_hidden_layers=1).to(DEVICE)
    inputs = {n: v.to(DEVICE) for n, v in labelled_batch(stock, (9, 9)).items()}
    del inputs["attention_mask"]
    model = fused(stock, backend="torch", packed=False)
    expected = model(**inputs).loss
    with cuda.capture():
        captured = model(**inputs).loss
    same({"loss": captured.detach()}, {"loss": expected.detach()})
