"""A layer whose products and GELU are one kernel each: the tests of nodes that it may change."""

import pytest
import torch
from support.launches import kernels
from test_layer_memory import large, test_peak, test_what_is_saved  # noqa: F401
from test_layer_nodes import (  # noqa: F401
    composed,
    test_a_second_derivative_is_refused,
    test_autocast,
    test_batched_gradients,
    test_frozen_parts,
    test_recompute_changes_no_gradient,
    test_the_gradient_that_comes_in_is_not_written_to,
    test_the_numbers_are_the_composed_ones,
)

from bertfast import ops
from bertfast.ops.linear import limits, run


@pytest.fixture
def backend(compiled):
    """The compiled one in all tests but the next, as Triton's interpreter takes seconds for each
    layer; its kernels have tests of their own."""
    return compiled


@pytest.mark.triton
def test_triton_s_numbers_are_the_composed_ones(composed, nodes, need):  # noqa: F811
    target = ("triton", "cuda" if torch.cuda.is_available() else "cpu")
    need("linear_gelu", target, torch.bfloat16)
    test_the_numbers_are_the_composed_ones(target, composed, nodes, "packed", 0.2)


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch):
    """As if `bertfast tune` had found it faster; yields the calls that took it."""
    choose, taken = run.choose, []

    def fused(backend, device, dtype, sizes, product=None, ops=run.GELU):
        chosen = choose(backend, device, dtype, sizes, product, ops)
        if chosen.after == "torch" or limits.unsupported_reason(dtype, *sizes) is not None:
            return chosen
        taken.append(sizes)
        return run.Choice(*3 * [chosen.after])

    monkeypatch.setattr(run, "choose", fused)
    yield taken


@pytest.fixture(autouse=True)
def _taken(one_kernel):
    yield
    assert one_kernel


@pytest.mark.host
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kernels(host_runtime, dropout):
    host_runtime.set_dry_launch(True)
    layer, x = large(dropout=dropout)
    layer.eval()
    with torch.no_grad():
        assert kernels(lambda: layer(x), host_runtime)[0] == 7
    layer.train()
    made = []
    assert kernels(lambda: made.append(layer(x)), host_runtime)[0] == 7 + bool(dropout)
    (y,) = made
    leaves, dy = [x, *layer.parameters()], torch.ones_like(y)
    count, names = kernels(lambda: torch.autograd.grad(y, leaves, dy), host_runtime)
    assert count == 17, names  # one of them makes the input of the MLP block again


def test_the_public_function(compiled):
    """By its default it takes the kernel too, and its gradients are those of two: the same bits, as
    the product's sums are exact, whatever their order."""
    torch.manual_seed(0)
    backend, device = compiled

    def leaf(*shape):
        # Quarters below 8: a sum of 32 products is a multiple of 1/16, and of few digits.
        quarters = torch.randn(shape, device=device).mul(4).round().div(4)
        return quarters.bfloat16().requires_grad_()

    given = leaf(3, 5, 32), leaf(64, 32), leaf(64)
    dy = torch.randn(3, 5, 64, device=device).bfloat16()
    results = []
    for fused in (None, False):
        y = ops.linear_gelu(*given, backend=backend, fused=fused)
        results.append((y, *torch.autograd.grad(y, given, dy)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
