"""Retrievers and rerankers in training, by sentence-transformers: its trainers, and its cached
losses, which run each mini-batch twice and count on the same dropout in both."""

import copy

import pytest
import torch
from support.hf_models import rows_seen
from support.retrieval import (
    LABELS,
    OFF,
    PASSAGES,
    QUERIES,
    SAME_LENGTH,
    bi_encoder,
    both_passes,
    draws_one_more,
    features,
    reranker,
    same_bits,
)

import bertfast
from bertfast.testing.budget import UNIT_ROUNDOFF

pytest.importorskip("transformers")
library = pytest.importorskip("sentence_transformers", reason="its training is tested")

from sentence_transformers.cross_encoder import losses as cross_losses  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402

STEPS = 20


def trained(kind, model, loss, columns, folder):
    """The loss of each step, and the shapes that fused layers saw."""
    datasets = pytest.importorskip("datasets", reason="the library's trainers need it")
    pytest.importorskip("accelerate", reason="the library's trainers need it")
    arguments = getattr(library, f"{kind}TrainingArguments")(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        seed=1,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = getattr(library, f"{kind}Trainer")(
        model, arguments, train_dataset=datasets.Dataset.from_dict(columns), loss=loss
    )
    shapes = rows_seen(trainer.train, {})
    return [told["loss"] for told in trainer.state.log_history if "loss" in told], shapes


TRAINERS = {
    "SentenceTransformer": (bi_encoder, losses.MultipleNegativesRankingLoss, {}),
    "CrossEncoder": (reranker, cross_losses.BinaryCrossEntropyLoss, {"label": LABELS}),
}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("kind", TRAINERS)
def test_its_trainer_has_the_stock_losses(kind, tmp_path):
    make, loss, labels = TRAINERS[kind]
    columns = {"query": QUERIES, "passage": PASSAGES, **labels}
    stock = make(tmp_path / "model", **OFF)
    model = bertfast.optimize(copy.deepcopy(stock))
    expected, _ = trained(kind, stock, loss(stock), columns, tmp_path)
    found, shapes = trained(kind, model, loss(model), columns, tmp_path)
    assert len(found) == STEPS and found == pytest.approx(expected, rel=0, abs=1e-4)
    assert expected[-1] < expected[0] - 0.1
    assert shapes and {rows for rows, _ in shapes} == {1}  # all of them packed
    model.save(str(tmp_path / "saved"))
    again = getattr(library, kind)(str(tmp_path / "saved"), device="cpu")
    call = "encode" if kind == "SentenceTransformer" else "predict"
    texts = PASSAGES if call == "encode" else list(zip(QUERIES, PASSAGES, strict=True))
    assert type(again[0].model).__module__.startswith("transformers")
    assert abs(getattr(again, call)(texts) - getattr(model.eval(), call)(texts)).max() < 2e-5


# Cached losses

CACHED = {
    "by size": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    "by tokens": lambda model: losses.CachedMultipleNegativesRankingLoss(
        model, mini_batch_num_tokens=24
    ),
    "guided": lambda model: losses.CachedGISTEmbedLoss(
        model, copy.deepcopy(model).eval(), mini_batch_size=3
    ),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("passages", [PASSAGES, SAME_LENGTH], ids=["padding", "no padding"])
@pytest.mark.parametrize("cached", CACHED)
def test_both_passes_of_a_cached_loss_drop_the_same(cached, passages, packed, tmp_path):
    model = bertfast.optimize(bi_encoder(tmp_path), packed=packed).train()
    loss, inputs = CACHED[cached](model), features(model, QUERIES, passages)
    assert same_bits(both_passes(model, loss, inputs))
    with draws_one_more(model):
        assert not same_bits(both_passes(model, loss, inputs))


def test_both_passes_of_a_cached_loss_of_pairs_drop_the_same(tmp_path):
    model = bertfast.optimize(reranker(tmp_path)).train()
    loss = cross_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=12)
    inputs = [QUERIES, PASSAGES]
    assert same_bits(both_passes(model, loss, inputs))
    with draws_one_more(model):
        assert not same_bits(both_passes(model, loss, inputs))


@pytest.mark.parametrize("packed", [True, False])
def test_both_passes_drop_the_same_on_a_backend(packed, compiled, tmp_path):
    backend, device = compiled
    model = bi_encoder(tmp_path).to(device, torch.bfloat16).train()
    bertfast.optimize(model, packed=packed, backend=backend)
    loss, inputs = CACHED["by size"](model), features(model, QUERIES[:5], PASSAGES[:5])
    assert same_bits(both_passes(model, loss, inputs))
    with draws_one_more(model):
        assert not same_bits(both_passes(model, loss, inputs))


def gradients(model, loss, columns):
    model.zero_grad()
    loss(features(model, *columns), None).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def errors(found, exact):
    assert found.keys() == exact.keys()
    return {name: (found[name] - exact[name]).abs().max().item() for name in exact}


@pytest.mark.parametrize("minibatches", [{"mini_batch_size": 3}, {"mini_batch_num_tokens": 24}])
@pytest.mark.parametrize("packed", [True, False])
def test_gradients_of_a_cached_loss_are_those_of_the_loss(packed, minibatches, tmp_path):
    """The oracle is the stock model with the loss itself, in float64; the yardstick the worst error
    of the stock model in float32 in ten right ways: without mini-batches, with them of nine sizes.
    As for whole models (bertfast/testing/model.py), which says why ten and why twice, an error may
    be 2 * (yardstick + u * scale)."""
    stock = bi_encoder(tmp_path, **OFF).train()
    model = bertfast.optimize(copy.deepcopy(stock), packed=packed)
    columns = (QUERIES + SAME_LENGTH[:2], PASSAGES + SAME_LENGTH[2:4])
    plain, cached = losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss
    double = copy.deepcopy(stock).double()
    exact = gradients(double, plain(double), columns)
    ways = [plain(stock), *(cached(stock, mini_batch_size=size) for size in range(1, 10))]
    ways = [errors(gradients(stock, way, columns), exact) for way in ways]
    allowed = {
        name: 2 * (max(way[name] for way in ways) + UNIT_ROUNDOFF[torch.float32] * g.abs().max())
        for name, g in exact.items()
    }
    for loss in (plain(model), cached(model, **minibatches)):
        found = gradients(model, loss, columns)
        for name, error in errors(found, exact).items():
            assert error <= allowed[name], name
    name = "0.model.encoder.layer.0.output.dense.weight"
    assert errors({name: found[name].bfloat16()}, {name: exact[name]})[name] > allowed[name]
