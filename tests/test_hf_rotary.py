"""Rotary positions of Hugging Face models: whose tables they are, and which positions are known."""

import copy
import functools

import pytest
import torch
from support.hf_models import KNOWN, PAD, batch, packs, tiny

import bertfast
from bertfast.hf import rotary
from bertfast.ops import dispatch
from bertfast.testing.model import HIDDEN_ATOL, beside_stock

PREFIXES = [family.prefix for family in KNOWN if "rotary" in family.layer]
each_family = pytest.mark.parametrize("prefix", PREFIXES)
pytestmark = [
    pytest.mark.skipif(not PREFIXES, reason="this transformers has none of the families"),
    pytest.mark.filterwarnings("ignore:bertfast runs the original code"),
]


def both(prefix, **config):
    stock = tiny(prefix + "Model", **config)
    return stock, bertfast.optimize(copy.deepcopy(stock), strict=True)


def close(got, expected, inputs):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[0][real], expected[0][real], rtol=0, atol=HIDDEN_ATOL)


@each_family
def test_positions_that_count_tokens_are_known_and_others_are_not(prefix):
    stock, model = both(prefix)
    inputs = batch()
    rows, length = inputs["input_ids"].shape
    counted = torch.arange(length)
    for ids in (counted[None], counted.expand(rows, -1)):
        given = inputs | {"position_ids": ids}
        close(model(**given), stock(**given), inputs)
        assert packs(model, given)
    for ids in (counted.flip(0)[None], counted[None] * 2):
        given = inputs | {"position_ids": ids}
        assert torch.equal(model(**given)[0], stock(**given)[0]) and not packs(model, given)


@pytest.mark.host
@each_family
def test_by_the_compiled_kernels(prefix, need):
    """In bfloat16, beside the stock model's own error, with the gradients of all parameters."""
    layers = {family.prefix: family.layer for family in KNOWN}
    wanted = tuple(word for word in ("rotary", "window") if word in layers[prefix])
    case = (torch.device("cpu"), torch.bfloat16, 16, None, wanted)
    if reason := dispatch.unsupported_reason("attention_qkv", "cuda", *case):
        pytest.skip(reason)
    stock, inputs = tiny(prefix + "Model", num_hidden_layers=1).bfloat16(), batch((3, 20))
    convert = functools.partial(bertfast.optimize, backend="cuda", strict=True)
    for finding, _ in beside_stock(stock, convert, inputs, inputs["attention_mask"].bool()):
        assert finding.ok, finding


@each_family
def test_packed_by_the_caller_with_each_layers_output(prefix):
    """The first sequence is not the longest, and so its positions are not all that there are."""
    stock, model = both(prefix)
    texts = [torch.randint(5, 90, (n,)) for n in (3, 20)]
    bounds = torch.tensor([0, 3, 23], dtype=torch.int32)
    ids = torch.cat([torch.arange(len(text)) for text in texts])[None]
    given = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, output_hidden_states=True)
    for positions in ({}, {"position_ids": ids}):
        packed = model(torch.cat(texts)[None], **given, **positions).hidden_states
        for start, text in zip((0, 3), texts, strict=True):
            expected = stock(text[None], output_hidden_states=True).hidden_states
            for got, right in zip(packed, expected, strict=True):
                part = got[0, start : start + len(text)]
                torch.testing.assert_close(part, right[0], rtol=1e-5, atol=1e-5)


@each_family
def test_masked_tokens_between_others(prefix):
    """Without them those around would come nearer to each other."""
    stock, model = both(prefix)
    inputs = batch()
    inputs["input_ids"][1, 4:9] = PAD
    inputs["attention_mask"][1, 4:9] = 0
    close(model(**inputs), stock(**inputs), inputs)
    assert not packs(model, inputs) and "distances count" in str(bertfast.report(model).notes)


@each_family
def test_the_model_makes_the_tables_once(prefix, monkeypatch):
    stock, model = both(prefix)
    module, tables, seen = model.rotary_module(), rotary._tables, []
    calls = []
    monkeypatch.setattr(rotary, "_tables", lambda given: seen.append(tables(given)) or seen[-1])
    module.register_forward_hook(lambda m, args, out: calls.append(out))
    model(**batch())
    assert len(calls) == len(seen) >= 1
    for dtype in (torch.float32, torch.bfloat16):  # which transformers rounds them to
        seen.clear()
        calls.clear()
        model.to(dtype)(**batch((9, 20)))
        for table in (table for positions in seen for table in positions.rotary):
            assert table.dtype == torch.float32 and table.is_contiguous() and len(table) == 20
            whole = table.repeat(1, 2).to(dtype)
            assert torch.equal(whole.float(), table.repeat(1, 2))
            assert any(torch.equal(whole, theirs[0]) for pair in calls for theirs in pair)


SCALED = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 20},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_frequencies(kind):
    """Fixed ones, with the scaling of their tables; not those that change with the length."""
    told = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    stock, model = both("JinaEmbeddingsV3", rope_parameters=told)
    assert kind != "yarn" or stock.rotary_emb.attention_scaling != 1.0
    inputs = batch()
    close(model(**inputs), stock(**inputs), inputs)
    assert packs(model, inputs) == (kind != "dynamic")
    if kind == "dynamic":
        assert "rotary frequencies (dynamic)" in str(bertfast.report(model).notes)


@each_family
def test_a_rotary_module_of_somebody_elses(prefix):
    stock, model = both(prefix)
    inputs = batch()
    assert packs(model, inputs)
    for one in (stock, model):
        module = one.rotary_emb if prefix != "Esm" else one.rotary_embeddings

        class Mine(type(module)):
            def forward(self, *args, **kwargs):
                cos, sin = super().forward(*args, **kwargs)
                return sin, cos

        module.__class__ = Mine
    assert torch.equal(model(**inputs)[0], stock(**inputs)[0]) and not packs(model, inputs)


@each_family
def test_left_padding_and_packed_always(prefix):
    stock, inputs = tiny(prefix + "Model"), batch(side="left")
    model = bertfast.optimize(copy.deepcopy(stock), strict=True, packed="always")
    close(model(**inputs), stock(**inputs), inputs)


def test_esm_knows_how_much_of_a_row_is_masked():
    config = dict(token_dropout=True, mask_token_id=7, emb_layer_norm_before=True)
    stock, model = both("Esm", **config)
    inputs = batch()
    inputs["input_ids"][:, 2] = 7
    close(model(**inputs), stock(**inputs), inputs)
    assert packs(model, inputs)
    x = torch.randn(3, 20, 64)
    given = {"inputs_embeds": x, "attention_mask": inputs["attention_mask"]}
    close(model(**given), stock(**given), inputs)


def test_esm_with_absolute_positions():
    stock, model = both("Esm", position_embedding_type="absolute")
    inputs = batch()
    for given in (inputs, inputs | {"position_ids": torch.arange(20)[None] + 5}):
        close(model(**given), stock(**given), inputs)
        assert packs(model, given)


def test_a_model_that_is_made_shorter():
    """It then calls fewer layers."""
    stock, model = both("JinaEmbeddingsV3")
    inputs = batch()
    model(**inputs)
    for one in (stock, model):
        one.config.num_hidden_layers = 1
    close(model(**inputs), stock(**inputs), inputs)
    assert packs(model, inputs)
