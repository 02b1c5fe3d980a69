"""hidden_states, attentions and hooks are what they were."""

import copy
import pickle

import pytest
import torch
from support.hf_models import batch, packs, tiny

import bertfast

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_hidden_states_whenever_they_were_asked_for(name, when):
    stock, inputs = tiny(name), batch()
    expected = copy.deepcopy(stock)(**inputs, output_hidden_states=True).hidden_states
    model = stock
    if when != "after":
        model(**inputs, output_hidden_states=True)
    bertfast.optimize(model, strict=True)
    for _ in range(2):
        got = model(**inputs, output_hidden_states=True).hidden_states
        assert len(got) == len(expected) == 3
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if when == "both":
        bertfast.revert(model)
        again = model(**inputs, output_hidden_states=True).hidden_states
        assert all(map(torch.equal, again, expected))


@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_attentions(name):
    stock, inputs = tiny(name, attn_implementation="eager"), batch()
    expected = copy.deepcopy(stock)(**inputs, output_attentions=True).attentions
    model = bertfast.optimize(stock)
    got = model(**inputs, output_attentions=True).attentions
    assert len(got) == 2 and all(map(torch.equal, got, expected))
    model.config.output_attentions = True
    assert len(model(**inputs).attentions) == 2


def test_capture_through_a_head_and_by_the_configuration():
    model = bertfast.optimize(tiny("BertForMaskedLM"))
    inputs = batch()
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == 3


def test_recording_once_does_not_end_packing():
    """transformers' hooks stay on every layer after the first capture."""
    model, inputs = bertfast.optimize(tiny(attn_implementation="eager")), batch()
    assert packs(model, inputs)
    model(**inputs, output_hidden_states=True, output_attentions=True)
    assert packs(model, inputs)
    assert not packs(model, dict(inputs, output_hidden_states=True))
    assert [row.reason for row in bertfast.report(model)] == [None, None]


def test_a_capture_before_conversion_leaves_no_old_forward():
    """Some versions leave the class's forward on the instance, where it would hide the new one."""
    model, inputs = tiny(), batch()
    model(**inputs, output_hidden_states=True)
    assert packs(bertfast.optimize(model), inputs)
    model(**inputs, output_hidden_states=True)
    bertfast.revert(model)
    assert not packs(model, inputs)


HOOKED = {
    "layer": lambda m: m.encoder.layer[1],
    "attention": lambda m: m.encoder.layer[1].attention,
    "self-attention": lambda m: m.encoder.layer[0].attention.self,
    "intermediate": lambda m: m.encoder.layer[0].intermediate,
    "query": lambda m: m.encoder.layer[1].attention.self.query,
    "dense": lambda m: m.encoder.layer[1].output.dense,
    "norm": lambda m: m.encoder.layer[0].output.LayerNorm,
    "activation": lambda m: m.encoder.layer[0].intermediate.intermediate_act_fn,
    "embeddings": lambda m: m.embeddings,
    "word embeddings": lambda m: m.embeddings.word_embeddings,
    "encoder": lambda m: m.encoder,
}


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("where", HOOKED)
def test_a_hook_sees_what_it_saw(where, kind):
    stock, inputs = tiny(), batch()
    real = inputs["attention_mask"].bool()
    seen = []
    for model in (stock, bertfast.optimize(copy.deepcopy(stock))):
        calls = []
        module = HOOKED[where](model)
        if kind == "forward":
            module.register_forward_hook(lambda m, a, out, calls=calls: calls.append(out))
        elif kind == "pre":
            module.register_forward_pre_hook(lambda m, a, calls=calls: calls.append(a))
        else:
            module.register_full_backward_hook(lambda m, i, o, calls=calls: calls.append(o))
        output = model(**inputs)[0]
        output[real].square().sum().backward()
        # Of a layer's arguments the hidden states: converted layers have their mask elsewhere.
        seen.append([[t.shape for t in tensors_of(call)][:1] for call in calls])
    assert seen[0] == seen[1]
    assert seen[0] or (where, kind) == ("encoder", "backward")  # which torch can't call


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (tuple, list)) else []


def double(module, arguments, output):
    return (2 * output[0], output[1]) if isinstance(output, tuple) else 2 * output


def test_hooks_change_what_they_changed():
    stock, inputs = tiny(), batch()
    real = inputs["attention_mask"].bool()
    results = []
    for model in (stock, bertfast.optimize(copy.deepcopy(stock))):
        for where in ("query", "norm", "self-attention", "layer"):
            HOOKED[where](model).register_forward_hook(double)
        results.append(model(**inputs)[0][real])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_removed_hook_ends_its_effect():
    model, inputs = bertfast.optimize(tiny()), batch()
    handle = model.encoder.layer[0].register_forward_hook(lambda *a: None)
    assert not packs(model, inputs)
    handle.remove()
    assert packs(model, inputs)


def test_pickling_before_any_capture():
    model, inputs = bertfast.optimize(tiny()), batch()
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model) and type(again).__name__ == "BertModel"
    assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    assert len(again(**inputs, output_hidden_states=True).hidden_states) == 3
