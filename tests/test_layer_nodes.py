"""A layer as two autograd nodes: the gradients, and everything that may be done to a graph."""

import copy
import itertools
import math
import random

import pytest
import torch
from support.layers import (
    HEADS,
    INNER,
    LENGTH,
    ROWS,
    WIDTH,
    gradients,
    make,
    make_batch,
    make_input,
)
from torch.autograd import forward_ad

from bertfast.nn import Encoder, layer
from bertfast.nn.eligibility import Facts, layer_facts
from bertfast.packing.batch import Batch
from bertfast.testing.budget import UNIT_ROUNDOFF


@pytest.fixture
def composed(monkeypatch):
    """Within it, layers are made of the ops."""

    def composed(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(layer, "_attention_node", lambda *_: None)
            patch.setattr(layer, "_mlp_node", lambda *_: None)
            return function(*arguments)

    return composed


@pytest.mark.parametrize("kind", ["padded", "masked", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_numbers_are_the_composed_ones(backend, composed, nodes, kind, dropout):
    """Beside the same layer in float64 a node errs as the composed ops do: both round in the same
    places, but for the order of two sums."""
    module, batch = make(backend, dropout), make_batch(backend, kind)
    x = make_input(backend, batch)
    ours = gradients(module, x, batch)
    assert nodes == ["attention", "mlp"]
    theirs = composed(gradients, module, x, batch)
    exact = copy.deepcopy(module).double()
    exact.backend = "torch"
    reference = gradients(exact, x.detach().double().requires_grad_(), batch)
    u = UNIT_ROUNDOFF[torch.bfloat16]
    names = ["y", "x", *(name for name, _ in module.named_parameters())]
    for name, mine, other, right in zip(names, ours, theirs, reference, strict=True):
        if name.endswith("key.bias"):  # zero but for rounding
            right = torch.zeros_like(right)
            scale = reference[names.index(name) - 1].abs().max()
        else:
            scale = right.abs().max()
        error, yardstick = ((value.double() - right).abs().max() for value in (mine, other))
        assert error <= 2 * (yardstick + u * scale), name


def test_frozen_parts(compiled):
    """Whatever needs no gradient is left out, and the others keep their very bits. But for `up`'s
    weight below a frozen attention block: its input is then saved, and not made again of a z that
    was rounded."""
    module = make(compiled, 0.2)
    everything = gradients(module, make_input(compiled))
    names = ["x", *(name for name, _ in module.named_parameters())]
    exact = dict(zip(names, everything[1:], strict=True))
    rng = random.Random(0)
    subsets = [{name} for name in names]
    subsets += [set(rng.sample(names, rng.randint(2, len(names) - 1))) for _ in range(24)]
    for wanted in subsets:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in wanted)
        x = make_input(compiled).detach().requires_grad_("x" in wanted)
        _, *found = gradients(module, x)
        for name, gradient in zip((n for n in names if n in wanted), found, strict=True):
            if name == "intermediate.dense.weight" and not any(map(in_attention, wanted)):
                error, scale = (gradient - exact[name]).abs().max(), exact[name].abs().max()
                assert error <= 4 * UNIT_ROUNDOFF[gradient.dtype] * scale
            else:
                assert torch.equal(gradient, exact[name]), (name, wanted)


def in_attention(name):
    return name == "x" or name.startswith("attention.")


def test_without_any_gradient_there_is_no_node(compiled, nodes):
    module, x = make(compiled), make_input(compiled)
    y = module(x)
    with torch.no_grad():
        assert torch.equal(module(x), y)
    assert nodes == ["attention", "mlp"]
    module.requires_grad_(False)
    assert torch.equal(module(x.detach()), y)
    assert nodes == ["attention", "mlp"]


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_changes_no_gradient(backend, recompute):
    """h is made again by the kernel that made it."""
    module, x = make(backend, 0.2), make_input(backend)
    expected = gradients(module, x)
    module.recompute = recompute
    for mine, other in zip(gradients(module, x), expected, strict=True):
        assert torch.equal(mine, other)


def test_the_gradient_that_comes_in_is_not_written_to(compiled):
    module, x = make(compiled), make_input(compiled)
    y = module(x)
    dy = torch.randn_like(y)
    before = dy.clone()
    torch.autograd.grad(y, [x, *module.parameters()], dy)
    assert torch.equal(dy, before)


def test_a_second_backward_and_accumulation(compiled):
    module, x = make(compiled, 0.2), make_input(compiled)
    y = module(x)
    dy = torch.randn_like(y)
    y.backward(dy, retain_graph=True)
    once = [leaf.grad.clone() for leaf in (x, *module.parameters())]
    y.backward(dy)
    for leaf, first in zip((x, *module.parameters()), once, strict=True):
        assert torch.equal(leaf.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


def test_the_same_layer_twice(compiled, composed):
    """Its parameters' gradients are the sums of two nodes' each."""
    module, x = make(compiled), make_input(compiled)
    twice = torch.autograd.grad(module(module(x)).float().square().sum(), [*module.parameters()])
    other = copy.deepcopy(module)
    y = other(module(x)).float().square().sum()
    first = torch.autograd.grad(y, [*module.parameters(), *other.parameters()])
    count = len(twice)
    for both, a, b in zip(twice, first[:count], first[count:], strict=True):
        assert torch.equal(both, a + b)


def test_a_weight_in_two_places(compiled):
    """`up` and the transpose of `down` can't be, but two layers' weights can: tied layers."""
    one, two = make(compiled), make(compiled)
    apart = gradients_of_two(one, copy.deepcopy(two), make_input(compiled))
    two.intermediate.dense.weight = one.intermediate.dense.weight
    tied = gradients_of_two(one, two, make_input(compiled))
    a, b = apart
    assert torch.equal(tied[0], a + b)


def gradients_of_two(one, two, x):
    weights = {id(w): w for w in (one.intermediate.dense.weight, two.intermediate.dense.weight)}
    loss = two(one(x)).float().square().sum()
    return torch.autograd.grad(loss, list(weights.values()))


@pytest.mark.parametrize("name", ["query.weight", "out", "norm", "up", "down"])
def test_a_weight_changed_in_place_raises(compiled, name):
    module, x = make(compiled), make_input(compiled)
    parameter = {
        "query.weight": module.attention.self.query.weight,
        "out": module.attention.output.dense.weight,
        "norm": module.attention.output.LayerNorm.weight,
        "up": module.intermediate.dense.weight,
        "down": module.output.dense.weight,
    }[name]
    y = module(x)
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_derivative_is_refused(compiled, frozen):
    """Also where dy is a constant, and where only x wants a gradient: a penalty would be lost."""
    module, x = make(compiled), make_input(compiled)
    module.requires_grad_(not frozen)
    y = module(x)
    for leaf in (x,) if frozen else (x, module.output.dense.weight, module.attention.self.key.bias):
        (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y), create_graph=True)
        with pytest.raises(RuntimeError, match="a second derivative"):
            gradient.square().sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second derivative"):
            torch.autograd.grad(gradient.square().sum(), x, retain_graph=True, allow_unused=True)


def test_dual_tensors_run_the_reference(compiled, nodes):
    """With frozen weights a node would be left out, and its tangent dropped."""
    module, x = make(compiled).requires_grad_(False), make_input(compiled).detach()
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        found = forward_ad.unpack_dual(module(dual)).tangent
    assert nodes == [] and found is not None
    exact = copy.deepcopy(module).double()
    exact.backend = "torch"
    with forward_ad.dual_level():
        right = forward_ad.unpack_dual(
            exact(forward_ad.make_dual(x.double(), tangent.double()))
        ).tangent
    torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-2 * right.abs().max().item())


def test_batched_gradients(compiled):
    """Of torch.autograd.grad's is_grads_batched: one after the other, the very same bits."""
    module, x = make(compiled, 0.2), make_input(compiled)
    y = module(x)
    leaves = [x, *module.parameters()]
    dy = torch.randn(3, *y.shape, device=y.device).to(y.dtype)
    options = dict(retain_graph=True)
    together = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, **options)
    for number in range(3):
        alone = torch.autograd.grad(y, leaves, dy[number], **options)
        for name, a, b in zip(itertools.count(), together, alone, strict=False):
            u, scale = UNIT_ROUNDOFF[y.dtype], b.abs().max()
            # The sum of x's gradients is rounded once more, in another order of the products.
            assert (a[number] - b).abs().max() <= 4 * u * scale, name


def test_one_seed_serves_all_layers(compiled, monkeypatch):
    """It is drawn once a forward, and each layer drops other values."""
    from bertfast.nn import layer as module

    drawn = []
    real = module.draw_seed
    monkeypatch.setattr(module, "draw_seed", lambda device: drawn.append(1) or real(device))
    torch.manual_seed(0)
    encoder = Encoder(3, WIDTH, HEADS, INNER, dropout=0.5, attention_dropout=0.0, packed=False)
    state = encoder.layer[0].state_dict()
    for one in encoder.layer:
        one.load_state_dict(state)
        one.backend = compiled[0]
    encoder = encoder.to(compiled[1], torch.bfloat16)
    x = make_input(compiled)
    outputs = []
    for one in encoder.layer:
        one.register_forward_hook(lambda m, args, y: outputs.append((args[0], y)))
    encoder(x)
    assert len(drawn) == 1
    batch = layer.for_layers(Batch(), encoder._find(), x.device)
    masks = [one(x.detach(), batch) for one in encoder.layer]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert torch.equal(masks[0], encoder.layer[0](x.detach(), batch))  # by the seed alone


def test_a_layer_that_comes_twice_draws_anew(compiled):
    one = make(compiled, 0.5)
    facts = Facts(None, **layer_facts([one, one]))
    batch = layer.for_layers(Batch(), facts, torch.device(compiled[1]))
    assert batch.seed is None
    x = make_input(compiled).detach()
    assert not torch.equal(one(x, batch), one(x, batch))


def test_a_batch_of_another_shape_is_refused(compiled):
    module, x = make(compiled), make_input(compiled)
    mask = torch.ones(ROWS, LENGTH + 1, dtype=torch.bool, device=compiled[1])
    with pytest.raises(ValueError, match="key_mask must have shape"):
        module(x, Batch(key_mask=mask))
    packed = make_batch(compiled, "packed")
    with pytest.raises(ValueError, match="x must be the packed batch's"):
        module(x, packed)


def test_a_called_module_leaves_the_other_block_a_node(compiled, nodes):
    """As LoRA does on q and v: the MLP block is fused all the same."""

    class Called(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    module, x = make(compiled), make_input(compiled)
    gradients(module, x)
    query = module.attention.self.query
    other = Called(WIDTH, WIDTH).to(query.weight)
    other.load_state_dict(query.state_dict())
    module.attention.self.query = other
    nodes.clear()
    gradients(module, x)
    assert nodes == ["mlp"]
    module.attention.self.query, module.output.dense = query, Called(INNER, WIDTH).to(x)
    nodes.clear()
    gradients(module, x)
    assert nodes == ["attention"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(backend, nodes, composed, dtype):
    """float32 parameters and residuals, products in 16 bits; gradients in the parameters' dtype."""
    module, x = make(backend, dtype=torch.float32), make_input(backend, dtype=torch.float32)

    def run(module, x):
        with torch.autocast(backend[1], dtype=dtype):
            y = module(x, None)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
        return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]

    ours = run(module, x)
    assert nodes == ["attention", "mlp"]
    theirs = composed(run, module, x)
    exact = copy.deepcopy(module).double()
    exact.backend = "torch"
    reference = gradients(exact, x.detach().double().requires_grad_())
    names = ["y", "x", *(name for name, _ in module.named_parameters())]
    for name, mine, other, right in zip(names, ours, theirs, reference, strict=True):
        assert mine.dtype == torch.float32
        scale = right.abs().max()
        if name.endswith("key.bias"):
            right, scale = torch.zeros_like(right), reference[names.index(name) - 1].abs().max()
        error, yardstick = ((value.double() - right).abs().max() for value in (mine, other))
        assert error <= 2 * (yardstick + UNIT_ROUNDOFF[dtype] * scale), name


def test_the_unit_of_rounding_shows_a_missing_term(backend, composed):
    """The comparison of numbers fails without the residual's gradient."""
    module, x = make(backend), make_input(backend)
    exact = copy.deepcopy(module).double()
    exact.backend = "torch"
    right = gradients(exact, x.detach().double().requires_grad_())[1]
    y = module(x)
    assert math.isfinite(y.float().sum().item())
    scale = right.abs().max()
    other = composed(gradients, module, x)[1].double()
    yardstick = (other - right).abs().max()
    without = right - 0.1 * right.flip(0)
    assert (without - right).abs().max() > 2 * (yardstick + UNIT_ROUNDOFF[torch.bfloat16] * scale)
