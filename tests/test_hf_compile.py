"""torch.compile, torch.export, jit and functional transforms: the padded layout, whole graphs."""

import copy

import pytest
import torch
from support.hf_models import batch, tiny

import bertfast
from bertfast.testing.model import HIDDEN_ATOL

transformers = pytest.importorskip("transformers")


def close(got, expected, inputs):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=HIDDEN_ATOL)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name, backend",
    [("BertModel", "aot_eager"), ("RobertaModel", "eager"), ("DistilBertModel", "eager")],
)
def test_fullgraph(name, backend):
    one_layer = "n_layers" if name == "DistilBertModel" else "num_hidden_layers"
    stock = tiny(name, **{one_layer: 1})
    model = bertfast.optimize(copy.deepcopy(stock))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for lengths in ((5, 12), (12, 9)):
        inputs = batch(lengths)
        got = compiled(**inputs)[0]
        close(got, stock(**inputs)[0], inputs)
        expected = torch.autograd.grad(stock(**inputs)[0].sum(), stock.embeddings.parameters())
        grads = torch.autograd.grad(got.sum(), model.embeddings.parameters())
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_fullgraph_in_training_with_checkpointing():
    model = bertfast.optimize(tiny("BertForMaskedLM", num_hidden_layers=1)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch((5, 12))
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_converted_after_torch_compile():
    stock = tiny(num_hidden_layers=1)
    compiled = torch.compile(copy.deepcopy(stock), backend="eager")
    inputs = batch((5, 12))
    compiled(**inputs)
    bertfast.optimize(compiled)
    close(compiled(**inputs)[0], stock(**inputs)[0], inputs)
    assert [row.reason for row in bertfast.report(compiled)] == [None]


def test_layers_compiled_one_by_one():
    stock, inputs = tiny(), batch()
    model = bertfast.optimize(copy.deepcopy(stock))
    for layer in model.encoder.layer:
        layer.compile(backend="eager")
    close(model(**inputs)[0], stock(**inputs)[0], inputs)


def test_disabled_in_a_compiled_model():
    stock, inputs = tiny(num_hidden_layers=1), batch((5, 12))
    compiled = torch.compile(bertfast.optimize(copy.deepcopy(stock)), backend="eager")
    compiled(**inputs)
    with bertfast.disabled():
        close(compiled(**inputs)[0], stock(**inputs)[0], inputs)


@pytest.mark.parametrize(
    "name, strict", [("BertModel", False), ("BertModel", True), ("DistilBertModel", False)]
)
def test_export_with_dynamic_sizes(name, strict):
    model = bertfast.optimize(tiny(name))
    rows, length = torch.export.Dim("rows", min=2), torch.export.Dim("length", min=3, max=64)
    example = batch((5, 12, 7))
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            example,
            dynamic_shapes={n: {0: rows, 1: length} for n in example},
            strict=strict,
        )
        for lengths in ((5, 12, 7), (4, 21)):
            inputs = batch(lengths)
            close(program.module()(**inputs)[0], model(**inputs)[0], inputs)


def test_jit_trace():
    model, inputs = bertfast.optimize(tiny()), batch((5, 12))
    example = (inputs["input_ids"], inputs["attention_mask"])
    model.config.return_dict = False
    with torch.no_grad():
        traced = torch.jit.trace(model, example)
        other = batch((12, 3))
        got = traced(other["input_ids"], other["attention_mask"])[0]
        close(got, model(**other)[0], other)


def test_functional_call_and_grad():
    from torch.func import functional_call, grad

    stock, inputs = tiny(), batch((5, 9))
    real = inputs["attention_mask"].bool()
    model = bertfast.optimize(copy.deepcopy(stock))
    values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(values, of):
        return functional_call(of, values, (), inputs)[0][real].square().sum()

    got, expected = grad(loss)(values, model), grad(loss)(values, stock)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_meta_and_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with torch.device("meta"):
        model = bertfast.optimize(tiny())
        ids = torch.zeros(2, 5, dtype=torch.int64)
    assert model(ids, attention_mask=ids)[0].shape == (2, 5, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(2, 5, dtype=torch.int64)
        assert bertfast.optimize(tiny())(ids, attention_mask=ids)[0].shape == (2, 5, 64)
