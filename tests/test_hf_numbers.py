"""Converted models compute what stock ones do: every family, head, layout and activation."""

import copy

import pytest
import torch
from support.hf_models import FAMILIES, VOCABULARY, batch, tiny

import bertfast
from bertfast.testing.budget import worst
from bertfast.testing.model import HIDDEN_ATOL, beside_stock

transformers = pytest.importorskip("transformers")

LAYOUTS = {
    "right": dict(lengths=(5, 20, 13)),
    "left": dict(lengths=(5, 20, 13), side="left"),
    "none": dict(lengths=(12, 12)),
    "one row": dict(lengths=(7,), extra=4),
}


def check(model, inputs, real=None, **options):
    if real is None:
        real = inputs["attention_mask"].bool()
    found = beside_stock(model, lambda m: bertfast.optimize(m, **options), inputs, real)
    assert worst([finding for finding, _ in found]).ok, worst([f for f, _ in found])


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    check(tiny(family + "Model"), batch())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts(family, layout, packed):
    model, inputs = tiny(family + "Model"), batch(**LAYOUTS[layout])
    real = inputs["attention_mask"].bool()
    expected = model(**inputs)
    got = bertfast.optimize(copy.deepcopy(model), packed=packed)(**inputs)
    torch.testing.assert_close(got[0][real], expected[0][real], rtol=0, atol=HIDDEN_ATOL)
    assert got[0].isfinite().all()
    if "pooler_output" in expected:
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=HIDDEN_ATOL)


HEADS = [
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "XLMRobertaForTokenClassification",
    "CamembertForQuestionAnswering",
    "ElectraForPreTraining",
    "ElectraForSequenceClassification",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForQuestionAnswering",
]


@pytest.mark.parametrize("head", HEADS)
def test_heads(head):
    model = tiny(head)
    inputs = batch()
    check(model, inputs)
    rows = bertfast.report(bertfast.optimize(model, strict=True))
    assert [row.reason for row in rows] == [None, None]


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_multiple_choice(family):
    inputs = batch(lengths=(5, 9, 20, 13))
    inputs = {name: value.unflatten(0, (2, 2)) for name, value in inputs.items()}
    check(tiny(family + "ForMultipleChoice"), inputs, real=torch.zeros(0))


def test_losses_and_labels():
    model, inputs = tiny("BertForMaskedLM"), batch()
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    expected = model(**inputs, labels=labels).loss
    got = bertfast.optimize(model)(**inputs, labels=labels).loss
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_segments_and_positions_are_packed_with_their_tokens():
    inputs = batch()
    shape = inputs["input_ids"].shape
    inputs["token_type_ids"] = torch.randint(2, shape)
    inputs["position_ids"] = torch.randint(60, shape)
    check(tiny(), inputs)
    model = tiny("RobertaModel", type_vocab_size=2)
    check(model, inputs)
    inputs["task_type_ids"] = torch.randint(3, shape)
    check(tiny("ErnieModel"), inputs)
    del inputs["task_type_ids"]
    one_for_all = dict(inputs, position_ids=torch.arange(shape[1])[None] + 3)
    expected = model(**one_for_all)[0]
    got = bertfast.optimize(model)(**one_for_all)[0]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)


def test_inputs_embeds_not_dense():
    model, mask = tiny(), batch()["attention_mask"]
    inputs = {"inputs_embeds": torch.randn(3, 64, 20).transpose(1, 2), "attention_mask": mask}
    assert not inputs["inputs_embeds"].is_contiguous()
    check(model, inputs)


ACTIVATIONS = [
    ("gelu", "none"),
    ("gelu_new", "tanh"),
    ("gelu_pytorch_tanh", "tanh"),
    ("gelu_fast", "tanh"),
    ("gelu_python", "none"),
    ("relu", None),
    ("silu", None),
    ("quick_gelu", None),
    ("gelu_10", None),
]


@pytest.mark.parametrize("name, form", ACTIVATIONS)
def test_activations_over_wide_inputs(name, form):
    """exact and tanh GELU differ by 5e-4 at most: only wide inputs tell them apart."""
    from bertfast.nn.bert import gelu_form

    model = tiny(hidden_act=name)
    activation = model.encoder.layer[0].intermediate.intermediate_act_fn
    assert gelu_form(activation) == form
    x = torch.linspace(-8, 8, 4001)
    if form is not None:
        got = bertfast.ops.bias_gelu(x, approximate=form)
        torch.testing.assert_close(got, activation(x), rtol=1e-6, atol=1e-6)
    check(model, batch())


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_eps_of_nearly_constant_rows(eps):
    """If a row varies by less than eps, eps is what the result depends on."""
    model = tiny(layer_norm_eps=eps)
    with torch.no_grad():
        for layer in model.encoder.layer:
            for output in (layer.attention.output, layer.output):
                output.dense.weight.mul_(1e-4)
                output.dense.bias.mul_(1e-4)
                output.LayerNorm.weight.mul_(1e-3)
                output.LayerNorm.bias.zero_()
    check(model, batch())


@pytest.mark.parametrize("shape", [(3, 1), (1, 1)])
def test_hostile_shapes(shape):
    model = tiny()
    inputs = {"input_ids": torch.randint(5, VOCABULARY, shape)}
    inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    expected = model(**inputs)
    got = bertfast.optimize(copy.deepcopy(model))(**inputs)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)


def test_an_empty_batch():
    """Stock models can't reshape one; nothing is computed for one here."""
    ids = torch.zeros(0, 5, dtype=torch.int64)
    model = bertfast.optimize(tiny())
    assert model(ids)[0].shape == model(ids, attention_mask=ids)[0].shape == (0, 5, 64)


def test_odd_head_dimension():
    check(tiny(hidden_size=52, num_attention_heads=2), batch())  # 26: no kernel's favourite


def test_too_long_for_its_positions_raises_as_before():
    """Packed positions would lie beside the wrong tokens."""
    inputs = batch(lengths=(81, 90))
    for model in (tiny(), bertfast.optimize(tiny())):
        with pytest.raises((IndexError, RuntimeError)):
            model(**inputs)


@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_stock_dtypes(name, dtype):
    model, inputs = tiny(name), batch()
    fused = bertfast.optimize(copy.deepcopy(model))
    real = inputs["attention_mask"].bool()
    with torch.autocast("cpu", dtype):
        expected, got = model(**inputs), fused(**inputs)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
    exact = model(**inputs)[0][real]
    # Each rounds every product to 16 bits on its own way: both are as near to float32.
    stock_error = (expected[0][real].float() - exact).abs().max()
    assert (got[0][real].float() - exact).abs().max() <= 2 * stock_error
    grads = []
    for m in (model, fused):
        with torch.autocast("cpu", dtype):
            m(**inputs)[0][real].float().square().sum().backward()
        grads.append({n: p.grad.dtype for n, p in m.named_parameters() if p.grad is not None})
    assert grads[0] == grads[1]


def test_float64_keeps_its_precision():
    model, inputs = tiny().double(), batch()
    real = inputs["attention_mask"].bool()
    expected = model(**inputs)[0][real]
    got = bertfast.optimize(model)(**inputs)[0][real]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_another_dtype(dtype):
    model, inputs = tiny().to(dtype), batch()
    real = inputs["attention_mask"].bool()
    exact = copy.deepcopy(model).double()(**inputs)[0][real]
    expected = model(**inputs)[0][real]
    got = bertfast.optimize(model)(**inputs)[0][real]
    assert got.dtype == dtype
    floor = 8 * torch.finfo(dtype).eps
    assert (got.double() - exact).abs().max() <= 2 * (expected.double() - exact).abs().max() + floor


def test_packed_dropout_is_the_padded_one():
    """The masks are functions of the token's place in the padded batch, so a packed step drops what
    a padded one would; on a CPU only where a backend is asked for, else they are torch's."""
    model = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3).train()
    inputs = batch()
    real = inputs["attention_mask"].bool()
    for layer in model.encoder.layer:
        layer.attention.output.dropout.p = layer.output.dropout.p = 0.2
    results = []
    for packed in (True, False):
        bertfast.optimize(model, packed=packed, backend="torch")
        torch.manual_seed(3)
        results.append(model(**inputs)[0][real])
    assert not torch.allclose(results[0], bertfast.optimize(model).eval()(**inputs)[0][real])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
