"""The budget of a whole model's numbers: it catches planted faults, also where it compares few."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.hf_models import batch, tiny
from support.masked_lm import same

from bertfast.testing.model import _ShuffledSums, beside_stock, numbers

pytest.importorskip("transformers")


def tanh_gelu(model):
    for layer in model.base_model.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.GELU("tanh")


def another_eps(model):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5


def dropped_bias(model):
    with torch.no_grad():
        model.base_model.encoder.layer[1].output.dense.bias.zero_()


def one_product_in_bfloat16(model):
    dense = model.base_model.encoder.layer[1].intermediate.dense
    dense.forward = lambda x: F.linear(x.bfloat16().float(), dense.weight, dense.bias)


def softmax_in_half(model):
    def attend(q, k, v, attn_mask=None, scale=None, **_):
        scores = q @ k.transpose(-1, -2) * scale
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        return scores.half().softmax(-1).float() @ v

    forward = model.forward

    def patched(**inputs):
        with mock.patch.object(F, "scaled_dot_product_attention", attend):
            return forward(**inputs)

    model.forward = patched


def nothing(model):
    pass


FAULTS = (tanh_gelu, another_eps, dropped_bias, one_product_in_bfloat16, softmax_in_half)


def findings(name, fault):
    model = tiny(name)
    if fault is another_eps:  # which nothing but rows that hardly vary depend on
        with torch.no_grad():
            for layer in model.base_model.encoder.layer:
                for output in (layer.attention.output, layer.output):
                    output.dense.weight.mul_(1e-4)
                    output.dense.bias.mul_(1e-4)
                    output.LayerNorm.weight.mul_(1e-3)
                    output.LayerNorm.bias.zero_()

    def convert(copied):
        fault(copied)
        return copied

    inputs, real = batch(lengths=(5, 9, 20, 13)), None
    if name.endswith("MultipleChoice"):
        inputs = {key: value.unflatten(0, (2, 2)) for key, value in inputs.items()}
    else:
        real = inputs["attention_mask"].bool()
    return [finding for finding, _ in beside_stock(copy.deepcopy(model), convert, inputs, real)]


# 4 numbers come out of the first, 3,000 of the second.
MODELS = ("BertForMultipleChoice", "BertModel")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_planted_fault_is_caught(name, fault):
    found = findings(name, fault)
    outputs = [finding for finding in found if not finding.name.startswith("d ")]
    gradients = [finding for finding in found if finding.name.startswith("d ")]
    assert outputs and not all(finding.ok for finding in outputs)
    assert gradients and not all(finding.ok for finding in gradients)


@pytest.mark.parametrize("name", MODELS)
def test_without_a_fault_the_stock_model_is_inside(name):
    assert all(finding.ok for finding in findings(name, nothing))


def test_softmax_backward_by_contexts_is_the_same_in_float64():
    """sum(dO O) is sum(dP P): the yardstick's other form differs in its rounding alone."""
    stock, inputs = tiny(attn_implementation="eager").double(), batch()
    real = inputs["attention_mask"].bool()
    expected = numbers(stock, inputs, real)
    with _ShuffledSums(0, by_contexts=True) as way:
        got = numbers(stock, inputs, real)
    assert len(way._contexts) == stock.config.num_hidden_layers
    same(got, expected, rtol=1e-12)
    half = copy.deepcopy(stock).bfloat16()
    with _ShuffledSums(0):
        plain = numbers(half, inputs, real)
    with _ShuffledSums(0, by_contexts=True):
        other = numbers(half, inputs, real)
    name = "d encoder.layer.1.attention.self.key.bias"
    assert not torch.equal(plain[name], other[name])
