"""attn_implementation="bertfast", which is complete without any conversion."""

import copy
import json

import pytest
import torch
from support.hf_models import FAMILIES, batch, tiny

import bertfast.hf
from bertfast.testing.model import HIDDEN_ATOL

transformers = pytest.importorskip("transformers")


def both(name="BertModel", **config):
    stock = tiny(name, **config)
    model = copy.deepcopy(stock)
    model.set_attn_implementation("bertfast")
    return stock, model


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=HIDDEN_ATOL)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, side):
    if not getattr(transformers, family + "Model")._supports_attention_backend:
        pytest.skip("transformers has one attention for it, its own")
    stock, model = both(family + "Model")
    assert model.config._attn_implementation == "bertfast"
    inputs = batch(side=side)
    real = inputs["attention_mask"].bool()
    close(model(**inputs)[0][real], stock(**inputs)[0][real])
    close(model(inputs["input_ids"])[0], stock(inputs["input_ids"])[0])
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3


def test_the_mask_stays_two_dimensional(monkeypatch):
    from bertfast.hf import attention

    masks = []
    real = attention.ops.attention
    monkeypatch.setattr(
        attention.ops, "attention", lambda *a, **k: (masks.append(k["key_mask"]), real(*a, **k))[1]
    )
    _, model = both()
    model(**batch())
    assert [mask.shape for mask in masks] == [(3, 20)] * 2


def test_padding_is_not_attended():
    """An implementation without a mask function is handed none, and attends to padding."""
    _, model = both()
    inputs = batch()
    alone = model(inputs["input_ids"][:1, :5])[0]
    close(model(**inputs)[0][:1, :5], alone)


def test_gradients_and_dropout():
    stock, model = both()
    inputs = batch()
    real = inputs["attention_mask"].bool()
    grads = []
    for one in (stock, model):
        one(**inputs)[0][real].square().sum().backward()
        grads.append([p.grad for p in one.encoder.parameters()])
    for got, expected in zip(grads[1], grads[0], strict=True):
        close(got / expected.abs().max().clamp(min=1), expected / expected.abs().max().clamp(min=1))
    model.train()
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])


def test_packed_by_the_caller():
    stock, model = both()
    lengths = (5, 20, 13)
    ids = [torch.randint(5, 90, (n,)) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    given = dict(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
    )
    expected = torch.cat([stock(one[None])[0][0] for one in ids])
    close(model(**given)[0][0], expected)
    close(model(**given, max_length_q=20, max_length_k=20)[0][0], expected)
    longest = torch.tensor(20)
    close(model(**given, max_length_q=longest, max_length_k=longest)[0][0], expected)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    with pytest.raises(ValueError, match="packed inputs only"):
        model(**given)


def test_the_longest_sequence_is_asked_for_once(monkeypatch):
    """Not in each layer, as the host may have to wait; and again when the bounds have changed."""
    _, model = both()
    ids = torch.randint(5, 90, (1, 12))
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    asked = []
    for name in ("item", "max"):
        monkeypatch.setattr(torch.Tensor, name, count_of(name, asked))

    def run():
        asked.clear()
        positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])[None]
        packed = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
        return model(ids, position_ids=positions, **packed)[0]

    first = run()
    layers = model.config.num_hidden_layers
    assert layers > 1 and len(asked) == 2  # a max, and its item
    assert torch.equal(run(), first) and not asked
    bounds[1] = 2  # 10 tokens: beyond what was kept
    alone = model(ids[:, 2:], position_ids=torch.arange(10)[None])[0]
    close(run()[:, 2:], alone)


def count_of(name, calls):
    real = getattr(torch.Tensor, name)
    return lambda *given, **more: calls.append(1) or real(*given, **more)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_four_dimensions(dtype):
    stock, model = both()
    inputs = batch()
    mask = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 20, -1)
    if dtype != torch.bool:
        mask = (~mask).float() * torch.finfo(dtype).min
    inputs["attention_mask"] = mask
    assert torch.equal(model(**inputs)[0], stock(**inputs)[0])


@pytest.mark.parametrize("cross", [False, True])
def test_decoders_go_to_sdpa(cross):
    stock, model = both(is_decoder=True, add_cross_attention=cross)
    inputs = batch(side="left")
    if cross:
        inputs["encoder_hidden_states"] = torch.randn(3, 7, 64)
        inputs["encoder_attention_mask"] = batch((7, 2, 3))["attention_mask"]
    real = inputs["attention_mask"].bool()
    close(model(**inputs)[0][real], stock(**inputs)[0][real])


def test_grouped_heads_go_to_sdpa():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    stock = transformers.LlamaModel(config).eval()
    model = copy.deepcopy(stock)
    model.set_attn_implementation("bertfast")
    inputs = batch()
    inputs["input_ids"] %= 50
    real = inputs["attention_mask"].bool()
    close(model(**inputs)[0][real], stock(**inputs)[0][real])


def test_fullgraph_and_export_with_a_padded_mask():
    stock, model = both(num_hidden_layers=1)
    inputs = batch((5, 12, 7))
    real = inputs["attention_mask"].bool()
    expected = stock(**inputs)[0][real]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(**inputs)[0][real], expected)
    sizes = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("length", min=3, max=64)}
    with torch.no_grad():
        program = torch.export.export(
            model, (), inputs, dynamic_shapes={name: sizes for name in inputs}
        )
        other = batch((4, 21))
        mask = other["attention_mask"].bool()
        close(program.module()(**other)[0][mask], stock(**other)[0][mask])


def test_the_name_is_not_saved_and_loads_again(tmp_path):
    stock, model = both()
    model.save_pretrained(tmp_path)
    assert "bertfast" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="bertfast")
    assert again.config._attn_implementation == "bertfast"
    inputs = batch((9, 9))
    close(again(**inputs)[0], stock(**inputs)[0])


def test_together_with_a_conversion():
    stock, model = both()
    inputs = batch()
    bertfast.optimize(model)
    real = inputs["attention_mask"].bool()
    close(model(**inputs)[0][real], stock(**inputs)[0][real])
    with bertfast.disabled():
        close(model(**inputs)[0][real], stock(**inputs)[0][real])
