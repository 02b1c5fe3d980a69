"""Activations that a layer's kernels read and write, from their launches' own tensors.

A tensor counts once for each kernel that is told of it, however often the kernel loads it. The
figures are those of CONTRIBUTING's table, in units of tokens x width elements. Weights, statistics
and partial sums, which don't grow with the tokens or hardly do, are counted apart.
"""

import re
from pathlib import Path

import pytest
import torch
from support.launches import torchs

from bertfast.nn import EncoderLayer
from bertfast.ops.linear import run as linear_gelu
from bertfast.ops.triton_launch import Launch

WIDTH, HEADS, TOKENS = 384, 6, 640  # of which no weight has a multiple of the tokens' elements
UNIT = TOKENS * WIDTH
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
CHOICES = {
    "two kernels": linear_gelu.Choice("triton"),
    "one kernel": linear_gelu.Choice("triton", "triton", "triton"),
}
PASSES = ("inference", "training forward", "backward")

# What a kernel is given and doesn't touch: a backward in two kernels writes dq in the other.
UNUSED = {("attention_bwd_dkv_kernel", "dq_ptr")}

# Of torch's functions that launch a kernel: all tensors, by the shapes of what is given.
TORCHS = {
    "aten::mm": lambda a, b: (a, b, (a[0], b[1])),
    "aten::addmm": lambda c, a, b: (c, a, b, (a[0], b[1])),
    "aten::addmm_": lambda c, a, b: (c, c, a, b),
    "aten::sum": lambda x: (x, x[1:]),
}
SEED = ("aten::random_",)


@pytest.fixture
def traffic(monkeypatch):
    """function -> (name, elements of activations, of everything else) of each kernel."""
    launches = []

    def launch(self, grid, pointers, *rest, **options):
        named = zip(self.kernel.arg_names, pointers, strict=False)
        name = self.kernel.__name__
        used = [p for what, p in named if p is not None and (name, what) not in UNUSED]
        launches.append((name, [getattr(p, "base", p).numel() for p in used]))

    monkeypatch.setattr(Launch, "__call__", launch)

    def traffic(function):
        launches.clear()
        events = [event for event in torchs(function) if event.name not in SEED]
        found = list(launches)
        for event in events:
            tensors = TORCHS[event.name](*(shape for shape in event.input_shapes if shape))
            found.append((event.name, [torch.Size(shape).numel() for shape in tensors]))
        return [
            (name, sum(n for n in sizes if n % UNIT == 0), sum(n for n in sizes if n % UNIT))
            for name, sizes in found
        ]

    return traffic


def passes(traffic, choice, monkeypatch):
    """The kernels of a layer in inference, in training's forward, in its backward."""
    monkeypatch.setattr(linear_gelu, "choose", lambda *_: choice)
    torch.manual_seed(0)
    options = dict(dropout=0.1, attention_dropout=0.1, backend="triton")
    module = EncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options).to(torch.bfloat16)
    x = torch.randn(1, TOKENS, WIDTH).to(torch.bfloat16).requires_grad_()
    module(x)  # q, k and v find their place
    module.eval()
    with torch.no_grad():
        yield traffic(lambda: module(x))
    module.train()
    made = []
    yield traffic(lambda: made.append(module(x)))
    (y,) = made
    dy = torch.ones_like(y)
    leaves = [x, *module.parameters()]
    yield traffic(lambda: torch.autograd.grad(y, leaves, dy))


def table(row):
    """The figures of a row of CONTRIBUTING's table, by pass."""
    (line,) = re.findall(rf"^\| {row} \|(.*)\|$", CONTRIBUTING.read_text(), re.M)
    return dict(zip(PASSES, map(int, line.split("|")), strict=True))


# The tensors of a product alone: 1 + 3, 1 + 1, 1 + 4, 4 + 1; in the backward, each twice.
PRODUCTS = {"inference": 16, "training forward": 16, "backward": 32 + 2}  # two add to a sum
ATTENTION = {"inference": 4, "training forward": 4, "backward": 12}


@pytest.mark.triton
@pytest.mark.parametrize("kind", CHOICES)
def test_bytes_of_a_layer(traffic, monkeypatch, kind, need):
    if kind == "one kernel":
        need("linear_gelu", ("triton", "cpu"), torch.bfloat16)
    found = dict(zip(PASSES, passes(traffic, CHOICES[kind], monkeypatch), strict=True))
    units = {name: sum(k[1] for k in kernels) / UNIT for name, kernels in found.items()}
    assert units == table(f"all kernels, GELU in {kind}"), found
    beside = {name: units[name] - PRODUCTS[name] - ATTENTION[name] for name in PASSES}
    assert beside == table(f"beside products and attention, GELU in {kind}")
    # What doesn't count there: weights, twice in the backward (the parameters and their gradients),
    # and a twentieth at most of statistics and partial sums.
    weights = 12 * WIDTH**2
    for name, kernels in found.items():
        rest = sum(k[2] for k in kernels) - weights * (2 if name == "backward" else 1)
        assert 0 < rest < 0.07 * sum(k[1] for k in kernels), name
