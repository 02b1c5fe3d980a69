"""Training: train and eval, dropout, checkpointing in every form."""

import concurrent.futures
import contextlib
import copy
import functools

import pytest
import torch
from support.hf_models import batch, packs, rows_seen, tiny
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import bertfast

transformers = pytest.importorskip("transformers")


def gradients(model, inputs, seed=5):
    torch.manual_seed(seed)
    model.zero_grad()
    real = inputs["attention_mask"].bool()
    model(**inputs)[0][real].tanh().pow(3).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        atol = 1e-5 * max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_the_training_flag_is_kept(name):
    inputs = batch()
    model = bertfast.optimize(tiny(name))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    model.train()
    assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
    assert packs(model, inputs)
    model.encoder_module().layer[0].eval()  # some freeze a part in this way
    assert rows_seen(model, inputs)


def test_dropout_drops_the_share_it_should_and_keeps_the_mean():
    model = tiny(num_hidden_layers=1, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.0)
    layer = bertfast.optimize(model).encoder.layer[0].train()
    with torch.no_grad():
        layer.attention.output.dense.weight.zero_()
        layer.attention.output.dense.bias.fill_(3.0)
        layer.output.dense.weight.zero_()
        layer.output.dense.bias.zero_()
        # LayerNorms that show what they are given: of two values, one dropped, it is +-1
        layer.attention.output.LayerNorm.weight.fill_(1.0)
        layer.attention.output.LayerNorm.bias.zero_()
        layer.output.LayerNorm.weight.fill_(1.0)
        layer.output.LayerNorm.bias.zero_()
    dropped = (layer(torch.zeros(8, 64, 64)) < 0).float().mean()
    # 32768 draws: the standard deviation of the mean is 0.0024
    assert abs(dropped.item() - 0.25) < 0.012


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_checkpointing_recomputes_with_the_same_masks(name, reentrant, packed):
    stock = tiny(name).train()
    model = bertfast.optimize(stock, packed=packed)
    inputs = batch()
    model.enable_input_require_grads()
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert packs(model, inputs) == packed
    from bertfast.hf import layer

    calls = []
    run = layer.run_layer
    try:
        layer.run_layer = lambda *a: (calls.append(1), run(*a))[1]
        got = gradients(model, inputs)
    finally:
        layer.run_layer = run
    assert len(calls) == 4  # two layers, each again in the backward
    same(got, expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_torch_checkpoint_wrapper(when):
    model, inputs = tiny().train(), batch()
    expected = gradients(bertfast.optimize(copy.deepcopy(model)), inputs)
    if when == "after":
        bertfast.optimize(model)

    def wrap(module):
        return checkpoint_wrapper(module, checkpoint_impl=CheckpointImpl.NO_REENTRANT)

    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=wrap,
        check_fn=lambda m: isinstance(m, transformers.models.bert.modeling_bert.BertLayer),
    )
    bertfast.optimize(model)
    assert packs(model, inputs)
    got = {
        n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gradients(model, inputs).items()
    }
    same(got, expected)


def test_reproducible_by_the_seed_of_torch():
    model, inputs = bertfast.optimize(tiny()).train(), batch()
    first, second = gradients(model, inputs, 1), gradients(model, inputs, 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = gradients(model, inputs, 2)
    assert not torch.equal(
        first["embeddings.LayerNorm.weight"], other["embeddings.LayerNorm.weight"]
    )


def test_a_dropout_of_somebody_elses_is_called():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    stock, inputs = tiny(), batch()
    stock.encoder.layer[0].output.dropout = Twice()
    fused = bertfast.optimize(copy.deepcopy(stock))
    for model in (stock, fused):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    same(gradients(fused, inputs), gradients(stock, inputs))


def test_a_norm_of_somebody_elses_is_called():
    class Root(torch.nn.Module):
        def forward(self, x):
            return x / x.square().mean(-1, keepdim=True).sqrt()

    stock, inputs = tiny(), batch()
    stock.encoder.layer[1].output.LayerNorm = Root()
    same(gradients(bertfast.optimize(copy.deepcopy(stock)), inputs), gradients(stock, inputs))


def test_a_self_attention_of_somebody_elses_is_called():
    """It has the same children, and need not do the same with them."""
    stock, inputs = tiny(), batch()

    class Scaled(type(stock.encoder.layer[0].attention.self)):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 3 * out, weights

    stock.encoder.layer[0].attention.self.__class__ = Scaled
    fused = bertfast.optimize(copy.deepcopy(stock))
    same(gradients(fused, inputs), gradients(stock, inputs))
    reasons = [row.reason for row in bertfast.report(fused)]
    assert "Scaled" in reasons[0] and reasons[1] is None


@pytest.mark.filterwarnings("ignore:bertfast runs the original code")
def test_a_layer_of_somebody_elses_gets_its_mask():
    stock, inputs = tiny(), batch()

    class Mine(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, mask, *args, **kwargs):
            assert mask is not None and "bertfast_batch" not in kwargs
            return self.layer(x, mask)

    stock.encoder.layer[0] = Mine(stock.encoder.layer[0])
    fused = bertfast.optimize(copy.deepcopy(stock))
    same(gradients(fused, inputs), gradients(stock, inputs))


def test_a_step_of_training_is_the_stock_one():
    stock = tiny(
        "BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).train()
    fused = bertfast.optimize(copy.deepcopy(stock))
    inputs = batch()
    labels = torch.tensor([0, 1, 1])
    losses = []
    for model in (stock, fused):
        step = torch.optim.SGD(model.parameters(), lr=0.01)
        its = []
        for _ in range(4):
            step.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            step.step()
            its.append(loss.item())
        losses.append(its)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-3)


def _no_block():
    return contextlib.nullcontext()


BLOCKS = {
    "forward in it": (bertfast.disabled, _no_block),
    "backward in it": (_no_block, bertfast.disabled),
    "both in it": (bertfast.disabled, bertfast.disabled),
}


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_what_a_checkpoint_runs_again_is_what_it_ran(blocks, in_thread):
    """Wherever the backward is: stock code and bertfast save other tensors and drop others."""
    around_forward, around_backward = BLOCKS[blocks]
    model, inputs = bertfast.optimize(tiny("BertModel")).train(), batch()

    def step(x, mask):
        return model(inputs_embeds=x, attention_mask=mask)[0]

    def within(x, mask):
        """Blocks inside the function are no block around it."""
        with bertfast.disabled():
            first = step(x, mask)
        return first + step(x, mask)

    x = torch.randn(3, 20, 64, requires_grad=True)
    for function in (step, within):
        expected = []
        for run in (function, functools.partial(checkpoint, function, use_reentrant=False)):
            torch.manual_seed(1)
            with around_forward():
                loss = run(x, inputs["attention_mask"]).square().sum()

            def backward(loss=loss, retain_graph=False):
                with around_backward():
                    return torch.autograd.grad(loss, x, retain_graph=retain_graph)[0]

            if in_thread:
                with concurrent.futures.ThreadPoolExecutor(1) as other:
                    expected.append(other.submit(backward).result())
            else:
                expected.append(backward(retain_graph=True))
                assert torch.equal(backward(), expected[-1])
        assert torch.equal(*expected)
