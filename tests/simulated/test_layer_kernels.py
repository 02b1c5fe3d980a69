"""A layer's kernels on a GPU where `bertfast tune` found one for a product and its GELU faster."""

import pytest
import torch
from support.launches import kernels

from bertfast.nn import EncoderLayer
from bertfast.ops import tuned
from bertfast.ops.linear import limits

host = pytest.importorskip("bertfast._host")

WIDTH, HEADS, ROWS, LENGTH = 64, 2, 3, 200


def measured(backend):
    """The file of a GPU on which this backend's kernel is faster."""
    form = (torch.bfloat16, WIDTH, 4 * WIDTH, limits.rows_class(ROWS * LENGTH))
    keys = (tuned.key("linear", *form, pass_) for pass_ in (None, "backward"))
    return tuned.Tuned({key: tuned.Choice(backend, {}) for key in keys}, {})


@pytest.mark.parametrize("backend, counts", [("torch", (8, 8, 18)), ("cuda", (7, 7, 17))])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kernels(backend, counts, dropout):
    """In inference, in training, in the backward. The kernel that draws the seed of dropout comes
    to the forward's; one of the backward's makes the input of the MLP block again."""
    options = dict(dropout=dropout, attention_dropout=dropout)
    layer = EncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options).to("cuda:1", torch.bfloat16)
    x = torch.randn(ROWS, LENGTH, WIDTH).to("cuda:1", torch.bfloat16).requires_grad_()
    leaves, made = [x, *layer.parameters()], []
    with tuned.held(measured(backend)):
        layer(x)  # q, k and v find their place
        layer.eval()
        with torch.no_grad():
            found = [kernels(lambda: layer(x), host)]
        layer.train()
        found.append(kernels(lambda: made.append(layer(x)), host))
        dy = torch.ones_like(made[0])
        found.append(kernels(lambda: torch.autograd.grad(made[0], leaves, dy), host))
    first, second, third = counts
    assert [count for count, _ in found] == [first, second + bool(dropout), third], found
