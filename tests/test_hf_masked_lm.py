"""optimize(masked_lm_loss="fused"): numbers beside the stock head's, and what a call returns."""

import copy
import pickle

import pytest
import torch
from support.masked_lm import (
    HEADS,
    fused,
    labelled_batch,
    loss_and_gradients,
    makes_logits,
    mean_of_losses,
    same,
    stock_head,
)
from torch import nn

import bertfast
from bertfast.hf import heads
from bertfast.ops import dispatch
from bertfast.testing.model import beside_stock

transformers = pytest.importorskip("transformers")

every_head = pytest.mark.parametrize("name", HEADS)


@every_head
def test_float64(name, exact_rotation):
    stock = stock_head(name).double()
    inputs = labelled_batch(stock)
    model = fused(stock)
    assert not makes_logits(model, inputs) and makes_logits(stock, inputs)
    stock.loss_function = mean_of_losses  # of heads that have it
    # A million roundings, and far below what a wrong term would be.
    same(loss_and_gradients(model, inputs), loss_and_gradients(stock, inputs), rtol=1e-10)


class LossOnly(nn.Module):
    """The loss of a batch that comes as one row, so that it isn't taken apart."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, **inputs):
        outputs = self.head(**{name: value[0] for name, value in inputs.items()})
        return {"loss": outputs["loss"][None]}


@every_head
def test_float32_stays_within_the_budget(name, exact_rotation):
    stock = stock_head(name)
    inputs = labelled_batch(stock, (5, 20, 13, 9, 30, 11))
    findings = beside_stock(
        LossOnly(stock),
        lambda model: bertfast.optimize(model, masked_lm_loss="fused"),
        {name: value[None] for name, value in inputs.items()},
    )
    assert len(findings) > 15
    for finding, _ in findings:
        assert finding.ok, finding


def test_a_wrong_row_breaks_the_budget(monkeypatch):
    stock = stock_head()
    inputs = labelled_batch(stock)

    def shifted(*arguments):
        rows, labels, count = labelled(*arguments)
        return rows.roll(1, 0), labels, count

    labelled = heads._labelled
    monkeypatch.setattr(heads, "_labelled", shifted)
    findings = beside_stock(
        LossOnly(stock),
        lambda model: bertfast.optimize(model, masked_lm_loss="fused"),
        {name: value[None] for name, value in inputs.items()},
    )
    assert not all(finding.ok for finding, _ in findings)


@every_head
def test_the_head_sees_labelled_tokens_only(name, monkeypatch):
    model = fused(stock_head(name))
    inputs = labelled_batch(model)
    counts, loss = [], heads.linear_cross_entropy

    def spy(rows, *arguments, **options):
        counts.append(rows.shape)
        return loss(rows, *arguments, **options)

    monkeypatch.setattr(heads, "linear_cross_entropy", spy)
    model(**inputs)["loss"].backward()
    width = 32 if name.startswith(("Albert", "Electra")) else 64
    assert counts == [(int((inputs["labels"] != -100).sum()), width)]


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.triton), "torch"])
def test_the_backend_is_the_models(backend, monkeypatch):
    stock = stock_head(num_hidden_layers=1)
    inputs = labelled_batch(stock, (6, 9))
    model = fused(stock, backend=backend)
    seen, choose = [], dispatch.choose

    def spy(op, backend, *arguments):
        seen.append((op, chosen := choose(op, backend, *arguments)))
        return chosen

    monkeypatch.setattr(dispatch, "choose", spy)
    same(loss_and_gradients(model, inputs), loss_and_gradients(stock, inputs))
    assert ("linear_cross_entropy", backend) in seen


@pytest.mark.parametrize("name", ["BertForPreTraining", "RobertaForMaskedLM"])
def test_fifty_steps_have_the_stock_models_losses(name):
    stock = stock_head(name)
    batches = [labelled_batch(stock, (9, 17, 12)) for _ in range(5)]
    curves = []
    for model in (stock, bertfast.optimize(copy.deepcopy(stock)), fused(stock)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curve = []
        for step in range(50):
            loss = model(**batches[step % 5]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-5:].mean() < curves[0][:5].mean() - 1
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=0, atol=1e-4)


@every_head
def test_eval_and_calls_without_labels_are_as_ever(name):
    stock = stock_head(name)
    plain, model = bertfast.optimize(copy.deepcopy(stock)), fused(stock)
    inputs = labelled_batch(stock)
    unlabelled = {n: v for n, v in inputs.items() if "label" not in n}
    logits = HEADS[name]
    for given, training in ((inputs, False), (unlabelled, True), (unlabelled, False)):
        expected = plain.train(training)(**given)
        got = model.train(training)(**given)
        assert got.keys() == expected.keys()
        assert torch.equal(got[logits], expected[logits])
        assert got.loss is expected.loss is None or torch.equal(got.loss, expected.loss)


def test_the_next_sentences_scores_stay():
    stock = stock_head("BertForPreTraining")
    inputs = labelled_batch(stock)
    got, expected = fused(stock)(**inputs), stock(**inputs)
    assert type(got) is type(expected)
    same(
        {"scores": got.seq_relationship_logits, "loss": got.loss},
        {"scores": expected.seq_relationship_logits, "loss": expected.loss},
    )
    del inputs["next_sentence_label"]  # then the stock model makes no loss either
    output = fused(stock)(**inputs)
    assert output.loss is None and output.prediction_logits is not None


@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
def test_hidden_states_and_attentions_come_along():
    stock = stock_head()
    stock.set_attn_implementation("eager")
    inputs = labelled_batch(stock)
    asked = dict(output_hidden_states=True, output_attentions=True)
    got, expected = fused(stock)(**inputs, **asked), stock(**inputs, **asked)
    assert got.logits is None
    for name in ("hidden_states", "attentions"):
        for a, b in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@every_head
def test_positional_arguments(name):
    stock = stock_head(name)
    inputs = labelled_batch(stock)
    first = [inputs.pop("input_ids"), inputs.pop("attention_mask")]
    expected, model = stock(*first, **inputs), fused(stock)
    got = model(*first, **inputs)
    same({"loss": got.loss}, {"loss": expected.loss})
    with pytest.raises(TypeError, match="multiple values"):
        model(*first, input_ids=first[0], **inputs)


@pytest.mark.filterwarnings("ignore:bertfast runs the original head")
@pytest.mark.parametrize("how", ["argument", "config"])
def test_a_tuple_has_its_logits(how):
    stock = stock_head()
    inputs = labelled_batch(stock)
    if how == "config":
        stock.config.return_dict = False
        got, expected = fused(stock)(**inputs), stock(**inputs)
    else:
        asked = dict(return_dict=False)
        got, expected = fused(stock)(**inputs, **asked), stock(**inputs, **asked)
    assert isinstance(got, tuple) and len(got) == len(expected) == 2
    real = inputs["attention_mask"].bool()  # the rest is padding's
    same({"loss": got[0]}, {"loss": expected[0]})
    torch.testing.assert_close(got[1][real], expected[1][real], rtol=0, atol=1e-4)


def test_no_labels_at_all():
    """As torch has it: the mean of nothing is NaN, and its gradients are zero."""
    stock = stock_head()
    inputs = labelled_batch(stock)
    inputs["labels"].fill_(-100)
    got, expected = loss_and_gradients(fused(stock), inputs), loss_and_gradients(stock, inputs)
    assert got["loss"].isnan() and expected["loss"].isnan()
    assert got.keys() == expected.keys()
    for name in got.keys() - {"loss"}:
        assert not got[name].any() and not expected[name].any(), name


def test_inputs_packed_by_the_caller():
    stock = stock_head()
    inputs = labelled_batch(stock)
    real = inputs["attention_mask"].bool()
    bounds = torch.tensor([0, 5, 25, 38], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (5, 20, 13)])
    packed = dict(
        input_ids=inputs["input_ids"][real][None],
        labels=inputs["labels"][real][None],
        position_ids=positions[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=20,
        max_length_k=20,
    )
    model = fused(stock)
    same(loss_and_gradients(model, packed), loss_and_gradients(stock, inputs))
    assert not makes_logits(model, packed)


def test_there_and_back():
    stock = stock_head()
    inputs = labelled_batch(stock)
    config = stock.config.to_dict()
    expected = stock(**inputs)
    model = fused(stock)
    assert isinstance(model, type(stock)) and type(model).__name__ == "BertForMaskedLM"
    assert list(model.state_dict()) == list(stock.state_dict())
    model(**inputs)
    assert model.config.to_dict() == config
    bertfast.optimize(model)  # without the option: the original head
    assert makes_logits(model, inputs) and not bertfast.report(model).notes
    bertfast.optimize(model, masked_lm_loss="fused")
    assert not makes_logits(model, inputs)
    with bertfast.disabled():
        assert torch.equal(model(**inputs).logits, expected.logits)
    bertfast.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in stock.modules()]
    assert torch.equal(model(**inputs).logits, expected.logits)


def test_copies_and_pickles(tmp_path):
    stock = stock_head()
    inputs = labelled_batch(stock)
    model = fused(stock)
    expected = model(**inputs).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = other(**inputs)
        assert output.logits is None and torch.equal(output.loss, expected)
    fresh = type(model)(model.config).train()
    fresh.load_state_dict(model.state_dict())
    assert makes_logits(fresh, inputs)  # a class alone converts nothing
    assert not makes_logits(bertfast.optimize(fresh, masked_lm_loss="fused"), inputs)
    model.save_pretrained(tmp_path)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path).train()
    assert again.config.architectures == ["BertForMaskedLM"]
    same({"loss": again(**inputs).loss}, {"loss": expected})


def test_the_report_tells_of_heads():
    model = fused(stock_head())
    assert bertfast.report(model).notes == [
        "BertForMaskedLM makes its loss in training without logits"
    ]
    outer = nn.ModuleDict({"inner": model})
    assert bertfast.report(outer).notes[0].startswith("inner makes its loss")
    model.cls.predictions.decoder.register_forward_hook(lambda *_: None)
    (note,) = bertfast.report(model).notes
    assert note.startswith("BertForMaskedLM runs its original head: a hook on its decoder")


def test_errors():
    with pytest.raises(ValueError, match='masked_lm_loss must be None or "fused", got True'):
        bertfast.optimize(stock_head(), masked_lm_loss=True)
    for name in ("BertModel", "ElectraForPreTraining", "BertForSequenceClassification"):
        model = stock_head(name)
        with pytest.raises(ValueError, match=f"needs a head, and {name} has none: bertfast knows"):
            bertfast.optimize(model, masked_lm_loss="fused")
        assert not bertfast.report(model).notes  # and nothing was converted
        assert {row.reason for row in bertfast.report(model)} == {"not converted"}

    class Mine(transformers.BertForMaskedLM):
        pass

    with pytest.raises(ValueError, match="Mine has none"):
        bertfast.optimize(Mine(stock_head().config), masked_lm_loss="fused")
