"""A layer whose gated MLP's products and activation are one kernel each: the tests of a node that
it may change."""

import pytest
import torch
from test_layer_gated import (  # noqa: F401
    composed,
    make,
    test_gradients_that_autograd_batches,
    test_recompute_and_frozen_parts,
    test_the_numbers,
)

from bertfast.ops import dispatch
from bertfast.ops.linear import run as linear_run
from bertfast.ops.linear_gated import run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(
    params=[
        pytest.param("triton", marks=pytest.mark.triton),
        pytest.param("cuda", marks=pytest.mark.host),
    ]
)
def backend(request, need):
    target = (request.param, DEVICE)
    need("linear_gated", target, torch.bfloat16)
    return target


@pytest.fixture
def compiled(backend):
    return backend


@pytest.fixture(autouse=True)
def one_kernel(backend, monkeypatch):
    """As if `bertfast tune` had found it faster; yields the calls that reached the kernels."""
    taken = []
    monkeypatch.setattr(run, "choose", lambda *case: run.Choice(*3 * backend[:1]))
    module = dispatch.backend_module("linear_gated", backend[0])
    for name in ("forward", "backward"):
        real = getattr(module, name)

        def call(*given, real=real, name=name):
            taken.append(name)
            real(*given)

        monkeypatch.setattr(module, name, call)
    yield taken


@pytest.fixture(autouse=True)
def _taken(one_kernel):
    yield
    assert {"forward", "backward"} == set(one_kernel)


def test_the_op_that_a_composed_layer_calls_takes_it(backend, composed, monkeypatch, one_kernel):  # noqa: F811
    """The gradient of its own product is autograd's, and the activation's is gated's."""
    monkeypatch.setattr(linear_run, "choose", lambda *case: run.Choice(*3 * backend[:1]))
    module = make(backend, "one")
    x = torch.randn(2, 5, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    composed(module, x).sum().backward()
    assert one_kernel == ["forward"]
    module(x).sum().backward()
    assert one_kernel == ["forward"] * 2 + ["backward"]
