"""ModernBERT's layers of two kinds: whatever runs, each has its window and its frequencies."""

import copy

import pytest
import torch
from support.hf_models import KNOWN, batch, packs, tiny

import bertfast
from bertfast.hf import layer
from bertfast.hf.families import modernbert
from bertfast.testing.model import HIDDEN_ATOL

pytestmark = [
    pytest.mark.skipif(
        modernbert.FAMILY not in KNOWN, reason="this transformers has it in another form"
    ),
    pytest.mark.filterwarnings("ignore:bertfast runs the original code"),
]


def both(name="ModernBertModel", **config):
    stock = tiny(name, num_hidden_layers=4, **config)
    return stock, bertfast.optimize(copy.deepcopy(stock), strict=True)


def close(model, stock, inputs):
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    got, expected = model(**inputs)[0], stock(**inputs)[0]
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=HIDDEN_ATOL)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_that_runs_its_original_code(number, masked):
    """Also where there is no mask of tokens, as there still is a window."""
    stock, model = both()
    for one in (stock, model):
        one.layers[number].attn.register_forward_hook(lambda m, a, out: (2 * out[0], *out[1:]))
    inputs = batch()
    if not masked:
        del inputs["attention_mask"]
    close(model, stock, inputs)
    assert [row.reason is None for row in bertfast.report(model)].count(False) == 1


def test_windows_and_frequencies_are_those_of_the_kind(monkeypatch):
    kinds = ("full_attention", "sliding_attention")
    rope = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in zip(kinds, (160000.0, 10.0), strict=True)
    }
    stock, model = both(rope_parameters=rope)
    close(model, stock, batch())
    run_layer, seen = layer.run_layer, []

    def spy(parts, x, call):
        seen.append((call.positions.window, call.positions.rotary))
        return run_layer(parts, x, call)

    monkeypatch.setattr(layer, "run_layer", spy)
    model(**batch())
    windows = [window for window, _ in seen]
    assert windows == [None, (4, 4), (4, 4), None]
    tables = [id(rotary) for _, rotary in seen]
    assert tables[0] == tables[3] != tables[1] == tables[2]
    assert not torch.equal(seen[0][1][0], seen[1][1][0])


def test_question_answering_keeps_its_padding():
    stock, model = both("ModernBertForQuestionAnswering")
    inputs = batch()
    assert not packs(model.model, inputs)
    assert "question answering" in str(bertfast.report(model).notes)
    close(model, stock, inputs)


def test_a_reranker_that_pools_by_the_mean():
    stock, model = both("ModernBertForSequenceClassification", classifier_pooling="mean")
    inputs = batch()
    assert packs(model, inputs)
    torch.testing.assert_close(model(**inputs)[0], stock(**inputs)[0], rtol=0, atol=HIDDEN_ATOL)


def test_masks_by_kind_run_the_original_code():
    stock, model = both()
    inputs = batch()
    shape = (*inputs["input_ids"].shape, inputs["input_ids"].shape[1])
    mask = torch.ones(shape, dtype=torch.bool)[:, None].tril()
    given = inputs | {"attention_mask": dict.fromkeys(stock.config.layer_types, mask)}
    assert torch.equal(model(**given)[0], stock(**given)[0])


def test_embeddings_that_are_given():
    stock, model = both()
    mask = batch()["attention_mask"]
    given = {"inputs_embeds": torch.randn(3, 20, 64), "attention_mask": mask}
    real = mask.bool()
    torch.testing.assert_close(
        model(**given)[0][real], stock(**given)[0][real], rtol=0, atol=HIDDEN_ATOL
    )
