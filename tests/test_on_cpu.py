"""A layer on a CPU without dropout: the bits of the composed ops, and when it runs."""

import pytest
import torch
from support.hf_models import batch, tiny
from support.layers import HEADS, INNER, LENGTH, WIDTH, PreNorm, make, make_batch, make_input
from torch import nn

import bertfast
from bertfast.nn import EncoderLayer, layer
from bertfast.nn.bert import bert_parts
from bertfast.nn.joined import JoinedWeights
from bertfast.nn.layer import Call, run_layer
from bertfast.nn.on_cpu import OnCpu
from bertfast.nn.parts import Gated, Positions
from bertfast.ops.linear import onednn
from bertfast.packing.batch import Batch

CPU = ("auto", "cpu")


class OneProduct(EncoderLayer):
    """With one product for q, k and v, one for both halves of a gated MLP, and positions."""

    def forward(self, x, batch=None):
        call = Call(
            *(batch or Batch(), JoinedWeights(), self.training, self.backend),
            positions=Positions(self.rotary, (2, 3)),
        )
        parts = bert_parts(self)._replace(
            qkv=self.three, up=self.both, gated=Gated(None, "gelu"), approximate=None
        )
        return run_layer(parts, x, call)


def after_a_norm(dtype):
    made = make(CPU, dtype=dtype, kind=PreNorm)
    made.attention.output.LayerNorm = nn.Identity()
    return made


def one_product(dtype):
    made = make(CPU, dtype=dtype)
    made.__class__ = OneProduct
    made.three, made.both = (nn.Linear(WIDTH, n, dtype=dtype) for n in (3 * WIDTH, 2 * INNER))
    angles = torch.arange(LENGTH)[:, None] / 10.0 ** torch.linspace(0, 1, WIDTH // HEADS // 2)
    made.rotary = angles.cos(), angles.sin()
    return made


KINDS = {
    "post-norm": lambda dtype: make(CPU, dtype=dtype),
    "pre-norm": lambda dtype: make(CPU, dtype=dtype, kind=PreNorm),
    "pre-norm, first of a model": after_a_norm,
    "tanh": lambda dtype: make(CPU, dtype=dtype, approximate="tanh"),
    "one product, gated": one_product,
}


@pytest.fixture
def runs(monkeypatch):
    """The layers that ran so."""
    found = []
    real = OnCpu.__init__

    def init(self, *arguments):
        found.append(self)
        real(self, *arguments)

    monkeypatch.setattr(OnCpu, "__init__", init)
    return found


@pytest.mark.parametrize("fused", ["0", "1"])
@pytest.mark.parametrize("shape", ["padded", "masked", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits(monkeypatch, runs, kind, dtype, shape, fused):
    monkeypatch.setenv(onednn.VARIABLE, fused)
    onednn.forget()
    if fused == "1" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    module, rows = KINDS[kind](dtype).eval(), make_batch(CPU, shape)
    x = make_input(CPU, rows, dtype)
    with torch.no_grad():
        ours = module(x, rows)
    ours_with_gradients = module(x, rows)
    (gradient,) = torch.autograd.grad(ours_with_gradients.square().sum(), x)
    assert len(runs) == 2
    monkeypatch.setattr(layer, "_is_simple", lambda *_: False)
    theirs = module(x, rows)
    (other,) = torch.autograd.grad(theirs.square().sum(), x)
    onednn.forget()
    assert len(runs) == 2
    assert torch.equal(ours, theirs) and torch.equal(ours_with_gradients, theirs)
    assert torch.equal(gradient, other)


def hooked(model):
    for one in model.encoder.layer:
        one.output.dense.register_forward_hook(lambda *_: None)


def mixed(model):
    """LayerNorms of another dtype, which the ops refuse by their own words."""
    for one in model.encoder.layer:
        one.output.LayerNorm.double()


@pytest.mark.parametrize(
    "change, used",
    [
        (lambda model: None, True),
        (lambda model: model.train(), False),
        (hooked, False),
    ],
    ids=["eval", "dropout", "hooks"],
)
def test_when(runs, change, used):
    model = bertfast.optimize(tiny()).eval()
    change(model)
    model(**batch())
    assert len(runs) == (len(model.encoder.layer) if used else 0)


def test_not_under_autocast(runs):
    model = bertfast.optimize(tiny()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch())
    assert not runs


def test_tensors_of_several_dtypes_are_refused(runs):
    model = bertfast.optimize(tiny()).eval()
    mixed(model)
    with pytest.raises(TypeError, match="must have dtype"):
        model(**batch())
    assert not runs
