"""Optimisers of pre-training, beside their formulas."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from bertfast.recipes.pretrain import optimizers  # noqa: E402
from bertfast.recipes.pretrain.optimizers import Settings, StableAdamW  # noqa: E402


def by_formula(weight, grads, lr, betas, eps, decay):
    """Algorithm 2 of arXiv 2304.13013, in float64."""
    w = weight.double()
    v, u = torch.zeros_like(w), torch.zeros_like(w)
    for t, grad in enumerate(grads, 1):
        g = grad.double()
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
        v = b1 * v + (1 - b1) * g
        u = b2 * u + (1 - b2) * g * g
        rms = (g * g / u.clamp(min=eps * eps)).mean().sqrt()
        rate = lr / max(1.0, float(rms))
        w = w - rate * decay * w - rate * v / (u.sqrt() + eps)
    return w


@pytest.mark.parametrize("jump", [1.0, 100.0])
def test_stable_adamw(jump):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]
    grads = [[torch.randn_like(w) for w in weights] for _ in range(4)]
    grads[3] = [g * jump for g in grads[3]]
    given = dict(lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    expected = [
        by_formula(w.detach(), [g[i] for g in grads], decay=0.1, **given)
        for i, w in enumerate(weights)
    ]
    optimizer = StableAdamW(weights, weight_decay=0.1, **given)
    for step in grads:
        for weight, grad in zip(weights, step, strict=True):
            weight.grad = grad.clone()
        before = [w.detach().clone() for w in weights]
        optimizer.step()
    for weight, wanted in zip(weights, expected, strict=True):
        # Four steps of a few roundings of 2^-24 each, of numbers below 4.
        torch.testing.assert_close(weight.double(), wanted, rtol=0, atol=2e-6)
    moved = max(float((w - b).detach().abs().max()) for w, b in zip(weights, before, strict=True))
    assert moved < 0.03  # lr times a few, however far the gradient jumped


def model():
    from transformers import BertConfig, BertForPreTraining

    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    return BertForPreTraining(BertConfig(vocab_size=30, max_position_embeddings=8, **small))


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_each_weight_is_in_one_group_and_what_decays_is_a_matrix(name):
    made = model()
    settings = Settings(0.1, (0.9, 0.98), 1e-6, 0.01)
    found = optimizers.make(name, made, settings)
    groups = [group for optimizer in found for group in optimizer.param_groups]
    taken = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(taken) == sorted(map(id, made.parameters()))
    for group in groups:
        for weight in group["params"]:
            assert group["weight_decay"] == (0.01 if weight.ndim > 1 else 0.0)
    assert [type(one).__name__ for one in found] == {
        "adamw": ["AdamW"],
        "stable-adamw": ["StableAdamW"],
        "muon": ["Muon", "AdamW"],
    }[name]
    if name == "muon":  # the layer's six matrices, and neither embeddings nor heads
        assert len(found[0].param_groups[0]["params"]) == 6
    optimizers.set_lr(found, 0.2)
    assert {group["lr"] for group in groups} == {0.2}


def test_learning_rates():
    linear = [optimizers.share_of_lr("linear", step, 10, 4, 0) for step in range(10)]
    assert linear == [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    wsd = [optimizers.share_of_lr("wsd", step, 10, 2, 4) for step in range(10)]
    assert wsd[:7] == [0.5, 1, 1, 1, 1, 1, 1] and wsd[8] == 1 - math.sqrt(0.5)
    assert optimizers.share_of_lr("linear", 0, 1, 0, 0) == 1.0
