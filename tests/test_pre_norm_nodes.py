"""A pre-norm layer as two autograd nodes, which carry on the sum that layer_norm returns."""

import copy
import random

import pytest
import torch
from support.layers import INNER, WIDTH, PreNorm, gradients, make_batch, make_input
from support.layers import make as make_kind

from bertfast.nn import layer
from bertfast.nn.composed import Composed
from bertfast.nn.parts import AFTER_ATTENTION, AFTER_MLP
from bertfast.ops import dropout_keep_mask
from bertfast.testing.budget import UNIT_ROUNDOFF


def make(*arguments, **options):
    return make_kind(*arguments, kind=PreNorm, **options)


@pytest.fixture
def composed(monkeypatch):
    """Within it, layers are made of the ops, and a residual's dropout is the kernels' own."""

    def linear_add(self, linear, x, residual, drop):
        y = self.linear(linear, x)
        if drop:
            place = AFTER_ATTENTION if linear is self.now.attention_output else AFTER_MLP
            made = self.dropouts.of(y, drop, place)
            keep = dropout_keep_mask(made.seed, made.site, (y.numel() // WIDTH, WIDTH), drop, "row")
            y = torch.where(keep.view(y.shape), y * made.scale, 0.0)
        return residual + y

    def composed(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(layer, "_attention_node", lambda *_: None)
            patch.setattr(layer, "_mlp_node", lambda *_: None)
            patch.setattr(Composed, "linear_add", linear_add)
            return function(*arguments)

    return composed


def held(ours, theirs, reference, names, dtype):
    """Beside the same layer in float64 a node errs as the composed ops do, which round more often:
    each sum, before it is normalised."""
    for name, mine, other, right in zip(names, ours, theirs, reference, strict=True):
        if name.endswith("key.bias"):  # zero but for rounding
            right = torch.zeros_like(right)
            scale = reference[names.index(name) - 1].abs().max()
        else:
            scale = right.abs().max()
        error, yardstick = ((value.double() - right).abs().max() for value in (mine, other))
        assert error <= 2 * (yardstick + UNIT_ROUNDOFF[dtype] * scale), name


def names_of(module):
    return ["y", "x", *(name for name, _ in module.named_parameters())]


def exact_of(module):
    exact = copy.deepcopy(module).double()
    exact.backend = "torch"
    return exact


@pytest.mark.parametrize(
    ("kind", "dropout"), [("padded", 0.2), ("masked", 0.0), ("packed", 0.0)], ids=str
)
def test_the_numbers_are_the_composed_ones(backend, composed, nodes, kind, dropout):
    module, batch = make(backend, dropout), make_batch(backend, kind)
    x = make_input(backend, batch)
    ours = gradients(module, x, batch)
    assert nodes == ["attention", "mlp"]
    theirs = composed(gradients, module, x, batch)
    leaf = x.detach().double().requires_grad_()
    reference = composed(gradients, exact_of(module), leaf, batch)
    held(ours, theirs, reference, names_of(module), torch.bfloat16)


@pytest.mark.parametrize("lost", ["dz", "dsum"])
def test_the_comparison_finds_a_lost_gradient_of_the_sum(compiled, composed, monkeypatch, lost):
    from bertfast.nn import attention_block

    module, x = make(compiled), make_input(compiled)
    theirs = composed(gradients, module, x)
    reference = composed(gradients, exact_of(module), x.detach().double().requires_grad_())
    real = attention_block.layer_norm.backward

    def losing(dy, dsum, saved, weight, dropout, wanted, backend):
        before = weight is module.attention.output.LayerNorm.weight
        dsum = None if before == (lost == "dz") else dsum
        return real(dy, dsum, saved, weight, dropout, wanted, backend)

    monkeypatch.setattr(attention_block.layer_norm, "backward", losing)
    with pytest.raises(AssertionError, match="x|attention"):
        held(gradients(module, x), theirs, reference, names_of(module), torch.bfloat16)


def test_frozen_parts(compiled):
    """Whatever needs no gradient is left out, and the others keep their very bits."""
    module = make(compiled, 0.2)
    names = names_of(module)[1:]
    exact = dict(zip(names, gradients(module, make_input(compiled))[1:], strict=True))
    rng = random.Random(0)
    subsets = [{name} for name in names]
    subsets += [set(rng.sample(names, rng.randint(2, len(names) - 1))) for _ in range(12)]
    for wanted in subsets:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in wanted)
        x = make_input(compiled).detach().requires_grad_("x" in wanted)
        _, *found = gradients(module, x)
        for name, gradient in zip((n for n in names if n in wanted), found, strict=True):
            assert torch.equal(gradient, exact[name]), (name, wanted)


def test_without_any_gradient_there_is_no_node(compiled, nodes):
    module, x = make(compiled), make_input(compiled)
    y = module(x)
    with torch.no_grad():
        assert torch.equal(module(x), y)
    assert nodes == ["attention", "mlp"]


def test_recompute_saves_less_and_changes_no_gradient(backend):
    module, x = make(backend, 0.2), make_input(backend)

    def run():
        sizes = {}

        def keep(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = gradients(module, x)
        return found, sum(sizes.values())

    expected, most = run()
    module.recompute = True
    found, least = run()
    assert most - least == x.numel() // WIDTH * INNER  # h
    assert all(map(torch.equal, found, expected))


def test_the_gradient_that_comes_in_is_not_written_to(compiled):
    module, x = make(compiled), make_input(compiled)
    y = module(x)
    dy = torch.randn_like(y)
    before = dy.clone()
    torch.autograd.grad(y, [x, *module.parameters()], dy)
    assert torch.equal(dy, before)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_derivative_is_refused(compiled, frozen):
    module, x = make(compiled), make_input(compiled)
    module.requires_grad_(not frozen)
    y = module(x)
    for leaf in (x,) if frozen else (x, module.output.dense.weight, module.attention.self.key.bias):
        (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y), create_graph=True)
        with pytest.raises(RuntimeError, match="a second derivative"):
            gradient.square().sum().backward(retain_graph=True)


def test_batched_gradients(compiled):
    module, x = make(compiled, 0.2), make_input(compiled)
    y = module(x)
    leaves = [x, *module.parameters()]
    dy = torch.randn(2, *y.shape, device=y.device).to(y.dtype)
    together = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
    for number in range(2):
        alone = torch.autograd.grad(y, leaves, dy[number], retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            assert (a[number] - b).abs().max() <= 4 * UNIT_ROUNDOFF[y.dtype] * b.abs().max()


@pytest.mark.parametrize("name", ["query.weight", "first norm", "second norm", "up", "down"])
def test_a_weight_changed_in_place_raises(compiled, name):
    module, x = make(compiled), make_input(compiled)
    y = module(x)
    parameter = {
        "query.weight": module.attention.self.query.weight,
        "first norm": module.attention.output.LayerNorm.weight,
        "second norm": module.output.LayerNorm.weight,
        "up": module.intermediate.dense.weight,
        "down": module.output.dense.weight,
    }[name]
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_called_module_leaves_the_other_block_a_node(compiled, nodes, composed):
    class Called(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    module, x = make(compiled), make_input(compiled)
    theirs = composed(gradients, module, x)
    reference = composed(gradients, exact_of(module), x.detach().double().requires_grad_())
    for linear, left in ((module.attention.self.query, "mlp"), (module.output.dense, "attention")):
        linear.__class__ = Called
        nodes.clear()
        held(gradients(module, x), theirs, reference, names_of(module), torch.bfloat16)
        assert nodes == [left]
        linear.__class__ = torch.nn.Linear


def test_autocast(backend, nodes, composed):
    """float32 parameters and sums, products in 16 bits; gradients in the parameters' dtype."""
    module, x = make(backend, dtype=torch.float32), make_input(backend, dtype=torch.float32)

    def run(module, x):
        with torch.autocast(backend[1], dtype=torch.bfloat16):
            y = module(x, None)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
        return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]

    ours = run(module, x)
    assert nodes == ["attention", "mlp"]
    assert all(value.dtype == torch.float32 for value in ours)
    theirs = composed(run, module, x)
    reference = gradients(exact_of(module), x.detach().double().requires_grad_())
    held(ours, theirs, reference, names_of(module), torch.bfloat16)
