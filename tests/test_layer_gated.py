"""A layer whose MLP is gated, activation(gate(x)) * up(x): as nodes, composed, and in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support.layers import HEADS, INNER, WIDTH, gradients, make_batch, make_input
from torch import nn

from bertfast.graphs import _why_not
from bertfast.nn import EncoderLayer, layer
from bertfast.nn.bert import bert_parts
from bertfast.nn.joined import JoinedWeights
from bertfast.nn.layer import Call, run_layer
from bertfast.nn.parts import Gated
from bertfast.packing.batch import Batch
from bertfast.testing.budget import UNIT_ROUNDOFF

ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU()}
FORMS = {
    "two without biases": ("silu", True, False),
    "two": ("gelu", True, True),
    "one": ("gelu_tanh", False, True),
}


class GatedLayer(EncoderLayer):
    """activation by its name; `two` products, gate and up, or one of both halves."""

    def __init__(self, activation, two, bias, **options):
        super().__init__(WIDTH, HEADS, INNER, **options)
        self.activation, self.two = activation, two
        self.gate = nn.Linear(WIDTH, INNER, bias) if two else None
        self.intermediate.dense = nn.Linear(WIDTH, INNER if two else 2 * INNER, bias)
        self._joined_up = JoinedWeights()

    def parts(self):
        activation = ACTIVATIONS[self.activation]
        approximate = {"gelu": "none", "gelu_tanh": "tanh"}.get(self.activation)
        return bert_parts(self)._replace(
            activation=activation,
            approximate=approximate,
            gated=Gated(self.gate, self.activation),
        )

    def forward(self, x, batch=None):
        call = Call(
            *(batch or Batch(), self._joined, self.training, self.backend, self.recompute),
            joined_up=self._joined_up,
        )
        return run_layer(self.parts(), x, call)


def make(backend, form, **options):
    torch.manual_seed(1)
    off = dict(dropout=0.0, attention_dropout=0.0)
    made = GatedLayer(*FORMS[form], backend=backend[0], **(off | options))
    for parameter in made.parameters():  # biases and norms that matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.to(backend[1], torch.bfloat16)


def by_modules(module, x):
    """The layer's MLP, in torch's own words."""
    parts, both = module.parts(), module.intermediate.dense(x)
    first, second = (module.gate(x), both) if module.two else both.chunk(2, -1)
    return parts.down(parts.activation(first) * second)


@pytest.fixture
def composed(monkeypatch):
    def composed(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(layer, "_mlp_node", lambda *_: None)
            return function(*arguments)

    return composed


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers(backend, composed, nodes, form):
    """A node errs as the composed ops do, beside the same layer in float64."""
    module, batch = make(backend, form), make_batch(backend, "packed")
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
            continue
        error, yardstick = ((value.double() - right).abs().max() for value in (mine, other))
        assert error <= 2 * (yardstick + u * right.abs().max()), name


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_the_modules(form):
    module = make(("torch", "cpu"), form).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    seen = []
    module.output.dense.register_forward_hook(lambda m, a, out: seen.append(out))
    module(x)
    attended = []
    handle = module.intermediate.dense.register_forward_pre_hook(lambda m, a: attended.append(a[0]))
    again = module(x)
    handle.remove()
    torch.testing.assert_close(seen[0], by_modules(module, attended[0]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again, module(x), rtol=1e-12, atol=1e-12)


def test_recompute_and_frozen_parts(compiled):
    """h is made again by the kernel that made it; what needs no gradient is left out."""
    module, x = make(compiled, "two"), make_input(compiled)
    expected = gradients(module, x)
    module.recompute = True
    assert all(map(torch.equal, gradients(module, x), expected))
    module.recompute = False
    names = ["x", *(name for name, _ in module.named_parameters())]
    exact = dict(zip(names, expected[1:], strict=True))
    for wanted in ({"gate.weight"}, {"intermediate.dense.bias", "gate.weight"}, {"x"}):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in wanted)
        x = make_input(compiled).detach().requires_grad_("x" in wanted)
        _, *found = gradients(module, x)
        for name, gradient in zip((n for n in names if n in wanted), found, strict=True):
            scale = exact[name].abs().max()
            assert (gradient - exact[name]).abs().max() <= 4 * 2**-8 * scale, name


def test_gradients_that_autograd_batches(compiled):
    module, x = make(compiled, "two"), make_input(compiled)
    y = module(x)
    dy = torch.randn(2, *y.shape).to(y)
    parameters = [x, module.gate.weight, module.intermediate.dense.bias]
    batched = torch.autograd.grad(y, parameters, dy, is_grads_batched=True, retain_graph=True)
    for number in range(2):
        one = torch.autograd.grad(y, parameters, dy[number], retain_graph=True)
        for several, alone in zip(batched, one, strict=True):
            assert torch.equal(several[number], alone)


def test_a_weight_that_changed_is_noticed(compiled):
    module, x = make(compiled, "two"), make_input(compiled)
    y = module(x).float().sum()
    with torch.no_grad():
        module.gate.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_graphs_take_what_is_read():
    module = make(("torch", "cpu"), "two")
    assert _why_not(module) is None
    for gated in (Gated(module.gate, None), Gated(nn.Bilinear(2, 2, 2), "silu")):
        parts = module.parts()._replace(gated=gated)
        assert _why_not(SimpleNamespace(parts=lambda parts=parts: parts)) is not None
