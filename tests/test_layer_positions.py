"""A layer whose scores know where queries and keys stand: as a node, composed, and in float64."""

import copy

import pytest
import torch
from support.layers import HEADS, LENGTH, WIDTH, gradients, make, make_batch, make_input

from bertfast.nn import EncoderLayer, layer
from bertfast.nn.bert import bert_parts
from bertfast.nn.layer import Call, run_layer
from bertfast.nn.parts import Positions
from bertfast.ops import dispatch
from bertfast.ops.attention import limits
from bertfast.packing.batch import Batch
from bertfast.testing.budget import UNIT_ROUNDOFF

REACH = 4
FORMS = {
    "rotary and a window": ("rotary", "window"),
    "a bias": ("distance_bias",),
    "a window": ("window",),
}


class Placed(EncoderLayer):
    """With rotary tables and a window, or with a bias by distance, which is a parameter."""

    names: tuple[str, ...]
    window = (2, 3)

    def positions(self) -> Positions:
        angles = torch.arange(LENGTH)[:, None] / 10.0 ** torch.linspace(0, 1, WIDTH // HEADS // 2)
        known = dict(
            rotary=tuple(t.to(self.device) for t in (angles.cos(), angles.sin())),
            window=self.window,
            distance_bias=getattr(self, "bias", None),
        )
        return Positions(**{name: known[name] for name in self.names})

    @property
    def device(self):
        return self.output.dense.weight.device

    def forward(self, x, batch=None):
        call = Call(
            *(batch or Batch(), self._joined, self.training, self.backend, self.recompute),
            positions=self.positions(),
        )
        return run_layer(bert_parts(self), x, call)


def placed(backend, form, dropout=0.0):
    module = make(backend, dropout)
    module.__class__ = Placed
    module.names = FORMS[form]
    if "distance_bias" in module.names:
        bias = torch.randn(HEADS, 2 * REACH + 1)
        module.bias = torch.nn.Parameter(bias.to(backend[1], torch.bfloat16))
    return module


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["masked", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_the_numbers(monkeypatch, nodes, form, kind):
    """A node errs as the composed ops do, beside the same layer in float64."""
    backend = ("triton", "cpu")
    case = (torch.device("cpu"), torch.bfloat16, WIDTH // HEADS, None, FORMS[form])
    if (reason := dispatch.unsupported_reason("attention_qkv", "triton", *case)) is not None:
        pytest.skip(reason)
    module, batch = placed(backend, form), make_batch(backend, kind)
    x = make_input(backend, batch)
    ours = gradients(module, x, batch)
    assert nodes == ["attention", "mlp"]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "_attention_node", lambda *_: None)
        theirs = gradients(module, x, batch)
    exact = copy.deepcopy(module).double()
    exact.backend = "torch"
    reference = gradients(exact, x.detach().double().requires_grad_(), batch)
    u = UNIT_ROUNDOFF[torch.bfloat16]
    names = ["y", "x", *(name for name, _ in module.named_parameters())]
    for name, mine, other, right in zip(names, ours, theirs, reference, strict=True):
        if name.endswith("key.bias"):  # near zero but for rounding
            continue
        error, yardstick = ((value.double() - right).abs().max() for value in (mine, other))
        assert error <= 2 * (yardstick + u * right.abs().max()), name
    plain = copy.deepcopy(exact)
    plain.names = ()
    assert (plain(x.detach().double(), batch) - reference[0]).abs().max() > 0.01


@pytest.mark.triton
def test_frozen_but_for_the_bias():
    backend = ("triton", "cpu")
    case = (torch.device("cpu"), torch.bfloat16, WIDTH // HEADS, None, ("distance_bias",))
    if (reason := dispatch.unsupported_reason("attention_qkv", "triton", *case)) is not None:
        pytest.skip(reason)
    module = placed(backend, "a bias")
    everything = dict(
        zip(
            ["y", "x", *(name for name, _ in module.named_parameters())],
            gradients(module, make_input(backend)),
            strict=True,
        )
    )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == "bias")
    _, alone = gradients(module, make_input(backend).detach())
    assert torch.equal(alone, everything["bias"])


@pytest.mark.host
@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_a_window_of_whole_sequences_is_none(monkeypatch, nodes, kind):
    """So kernels that have no window serve it."""
    monkeypatch.setitem(limits.FEATURES, "cuda", ())
    backend = ("cuda", "cpu")
    module, batch = placed(backend, "a window"), make_batch(backend, kind)
    module.window = LENGTH - 1, LENGTH
    x = make_input(backend, batch)
    found = gradients(module, x, batch)
    assert nodes == ["attention", "mlp"]
    module.names = ()
    for one, other in zip(found, gradients(module, x, batch), strict=True):
        assert torch.equal(one, other)


@pytest.mark.host
def test_a_node_asks_for_gradients_where_there_may_be_any(monkeypatch, nodes):
    """Without them "auto" may take another backend."""
    asked, choose = [], dispatch.choose

    def noting(op, *case):
        asked.extend([case[-1]] if op == "attention_qkv" else ())
        return choose(op, *case)

    monkeypatch.setattr(dispatch, "choose", noting)
    backend = ("cuda", "cpu")
    module = placed(backend, "a window")
    x = make_input(backend)
    gradients(module, x)
    with torch.no_grad():
        module(x)
    assert asked == [("window", limits.BACKWARD), ("window",)]
    assert nodes[:2] == ["attention", "mlp"]
