"""Steps of training with what a GPU's trainers add: a GradScaler, a fused optimizer, replicas,
losses that run each mini-batch twice."""

import pytest
import torch
from support import retrieval
from support.hf_models import batch, rows_seen, tiny
from support.simulated_gpu import kernels
from torch.utils.checkpoint import checkpoint

import bertfast
from bertfast.nn import layer

transformers = pytest.importorskip("transformers")

OFF = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_hidden_layers=1)


def classifier(converted):
    torch.manual_seed(1)
    model = tiny("BertForSequenceClassification", **OFF)
    return bertfast.optimize(model) if converted else model


def losses(model, steps):
    """Of autocast steps on the second device: the scaler looks at every gradient, the optimizer
    changes gathered weights in place."""
    model.to("cuda:1").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    torch.manual_seed(2)
    inputs = {name: value.to("cuda:1") for name, value in batch((5, 6)).items()}
    labels = torch.tensor([0, 1], device="cuda:1")
    found = []
    for _ in range(steps):
        with torch.autocast("cuda", torch.float16):
            loss = model(**inputs, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_grad_scaler_and_a_fused_optimizer():
    expected, got = losses(classifier(False), 3), losses(classifier(True), 3)
    assert expected[2] < expected[0] - 0.1
    # A logit is a float16 of about 1: two of them, some roundings each.
    assert got == pytest.approx(expected, abs=8 * 2**-11)


@pytest.mark.filterwarnings("ignore")
def test_trainer_on_two_devices(tmp_path):
    inputs = batch((5, 9, 7, 9))
    rows = [{n: v[row] for n, v in inputs.items()} | {"labels": row % 2} for row in range(4)]
    found = []
    for converted in (False, True):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-3,
            seed=1,
        )
        assert arguments.n_gpu == 2
        trainer = transformers.Trainer(classifier(converted), arguments, train_dataset=rows)
        kernels.launches.clear()
        found.append(trainer.train().training_loss)
    assert {launch.device for launch in kernels.launches} == {0, 1}
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_both_passes_of_a_cached_loss_drop_the_same(packed, tmp_path, monkeypatch):
    """Between them the generator of the inputs' device is set back, and of no other: the simulated
    devices share one, so which one draws is looked at."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = retrieval.bi_encoder(tmp_path).to("cuda:1", torch.bfloat16).train()
    bertfast.optimize(model, packed=packed)
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    inputs = retrieval.features(model, retrieval.QUERIES[:5], retrieval.PASSAGES[:5])
    drawn_on = set()

    def draw(device, draw=layer.draw_seed):
        drawn_on.add(str(device))
        return draw(device)

    monkeypatch.setattr(layer, "draw_seed", draw)
    kernels.launches.clear()
    assert retrieval.same_bits(retrieval.both_passes(model, loss, inputs))
    assert {launch.device for launch in kernels.launches} == {1} and drawn_on == {"cuda:1"}
    with retrieval.draws_one_more(model):
        assert not retrieval.same_bits(retrieval.both_passes(model, loss, inputs))


def cached_loss(tmp_path):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = bertfast.optimize(retrieval.bi_encoder(tmp_path).to("cuda:1")).train()
    inputs = retrieval.features(model, retrieval.QUERIES[:5], retrieval.PASSAGES[:5])
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    return model, lambda: loss(inputs, None)


def reentrant_checkpoint(tmp_path):
    model = bertfast.optimize(tiny().to("cuda:1")).train()
    mask = batch()["attention_mask"].to("cuda:1")
    x = torch.randn(*mask.shape, 64, device="cuda:1", requires_grad=True)

    def call(x):
        return model(inputs_embeds=x, attention_mask=mask)[0]

    return model, lambda: checkpoint(call, x, use_reentrant=True).square().sum()


@pytest.mark.parametrize("make", [cached_loss, reentrant_checkpoint])
def test_a_backward_in_a_block_of_disabled_is_in_it(make, tmp_path):
    """There the model is run again, in a thread of torch's own."""
    model, forward = make(tmp_path)

    def step():
        with bertfast.disabled():
            forward().backward()

    assert rows_seen(step, {}) == []  # no layer was fused
    assert all(p.grad is not None for n, p in model.named_parameters() if "layer.0" in n)
