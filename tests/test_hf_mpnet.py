"""MPNet's bias by distance: beyond its reach, its gradient over layers, and what is called."""

import copy

import pytest
import torch
from support.hf_models import batch, packs, tiny

import bertfast
from bertfast import notice
from bertfast.hf.families.mpnet import BUCKETS, REACH
from bertfast.testing.model import numbers

pytest.importorskip("transformers")
LENGTHS = (5, 300, 131)


def both(**config):
    stock = tiny("MPNetModel", max_position_embeddings=400, **config).double()
    return stock, bertfast.optimize(copy.deepcopy(stock), strict=True)


def test_buckets_stay_the_same_beyond_the_reach():
    _, model = both()
    far = torch.arange(REACH, 600)
    for distances in (far, -far):
        buckets = model.encoder.relative_position_bucket(distances, num_buckets=BUCKETS)
        assert len(set(buckets.tolist())) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_long_sequences_and_the_gradient_of_the_shared_table(packed):
    stock, model = both()
    bertfast.optimize(model, packed=packed)
    inputs = batch(LENGTHS)
    real = inputs["attention_mask"].bool()
    got, expected = numbers(model, inputs, real), numbers(stock, inputs, real)
    name = "d encoder.relative_attention_bias.weight"
    assert (expected[name] != 0).sum() == (BUCKETS - 1) * 4  # one bucket is nobody's
    for key, value in expected.items():
        atol = 1e-10 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(got[key], value, rtol=0, atol=atol)
    assert torch.equal(numbers(model, inputs, real)[name], got[name])


def test_masked_tokens_between_others():
    stock, model = both()
    inputs = batch()
    inputs["input_ids"][1, 4:9] = 1
    inputs["attention_mask"][1, 4:9] = 0
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs)[0][real], stock(**inputs)[0][real])
    assert not packs(model, inputs)


def test_a_layer_that_runs_its_original_code_gets_the_bias_of_all_pairs(monkeypatch):
    monkeypatch.setattr(notice, "_told", set())
    stock, model = both()
    for one in (stock, model):
        one.encoder.layer[1].attention.attn.register_forward_hook(lambda m, a, out: (2 * out[0],))
    inputs = batch()
    real = inputs["attention_mask"].bool()
    with pytest.warns(UserWarning, match="a hook on its MPNetSelfAttention"):
        got = model(**inputs)[0][real]
    torch.testing.assert_close(got, stock(**inputs)[0][real])


def test_export_of_lengths_on_both_sides_of_the_reach():
    stock, model = both(num_hidden_layers=1)
    sizes = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("length", min=3, max=390)}
    inputs = batch((5, 12))
    with torch.no_grad():
        program = torch.export.export(
            model, (), inputs, dynamic_shapes={name: sizes for name in inputs}
        )
        inputs = batch(LENGTHS)
        real = inputs["attention_mask"].bool()
        got = program.module()(**inputs)[0][real]
        torch.testing.assert_close(got, stock(**inputs)[0][real])
