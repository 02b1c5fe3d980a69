"""What a call costs on the host, in Python and torch: no kernel runs.

    pytest benchmarks/bench_overhead.py --benchmark-json=FILE

The CUDA path is taken with the kernels compiled for the host and their launch switched off, so the
same Python, checks, allocations and binding run as on a GPU, but for the launch itself. The tensors
are tiny, there is one thread, and what stock torch does instead, which does run, stands beside it.
"""

import pytest
import torch
import torch.nn.functional as F

from bertfast import ops

_host = pytest.importorskip("bertfast._host")
WIDTH = 768


@pytest.fixture(autouse=True)
def dry():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _host.set_dry_launch(True)
    yield
    _host.set_dry_launch(False)
    torch.set_num_threads(threads)


@pytest.fixture(params=[(8, WIDTH), (2, 4, WIDTH)], ids=["2d", "3d"])
def inputs(request):
    x, residual = torch.randn(request.param), torch.randn(request.param)
    weight, bias, x_bias = torch.ones(WIDTH), torch.zeros(WIDTH), torch.zeros(WIDTH)
    return {"x": x, "weight": weight, "bias": bias, "residual": residual, "x_bias": x_bias}


def fused(inputs):
    x, weight, bias, residual, x_bias = inputs.values()
    return lambda: ops.layer_norm(x, weight, bias, residual=residual, x_bias=x_bias, backend="cuda")


def fused_dropout(inputs):
    x, weight, bias, residual, x_bias = inputs.values()
    seed = torch.zeros(1, dtype=torch.int64)
    return lambda: ops.layer_norm(
        x,
        weight,
        bias,
        residual=residual,
        x_bias=x_bias,
        dropout_p=0.1,
        seed=seed,
        backend="cuda",
    )


def stock(inputs):
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return lambda: F.layer_norm(x, (WIDTH,), weight, bias, 1e-12)


def stock_sum(inputs):
    """What the fused call stands for: two additions, then layer_norm."""
    x, weight, bias, residual, x_bias = inputs.values()
    return lambda: F.layer_norm((x + x_bias) + residual, (WIDTH,), weight, bias, 1e-12)


def run(benchmark, call):
    benchmark.pedantic(call, rounds=2000, iterations=50, warmup_rounds=20)


@pytest.mark.parametrize("name", ["fused", "fused_dropout", "stock", "stock_sum"])
def test_gradients_off(benchmark, inputs, name):
    with torch.no_grad():
        run(benchmark, globals()[name](inputs))


@pytest.mark.parametrize("name", ["fused", "fused_dropout", "stock", "stock_sum"])
def test_gradients_on(benchmark, inputs, name):
    for tensor in inputs.values():
        tensor.requires_grad_()
    run(benchmark, globals()[name](inputs))


@pytest.mark.parametrize("name", ["fused", "fused_dropout", "stock_sum"])
def test_backward(benchmark, inputs, name):
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    y = globals()[name](inputs)()
    dy = torch.randn_like(y)
    run(benchmark, lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))


@pytest.fixture
def gelu_inputs():
    return torch.randn(8, WIDTH), torch.randn(WIDTH)


def fused_gelu(x, bias):
    return ops.bias_gelu(x, bias, backend="cuda")


def stock_gelu(x, bias):
    return F.gelu(x + bias)


@pytest.mark.parametrize("name", ["fused_gelu", "stock_gelu"])
def test_gelu_gradients_off(benchmark, gelu_inputs, name):
    function = globals()[name]
    with torch.no_grad():
        run(benchmark, lambda: function(*gelu_inputs))


@pytest.mark.parametrize("name", ["fused_gelu", "stock_gelu"])
def test_gelu_gradients_on(benchmark, gelu_inputs, name):
    function = globals()[name]
    for tensor in gelu_inputs:
        tensor.requires_grad_()
    run(benchmark, lambda: function(*gelu_inputs))


@pytest.mark.parametrize("name", ["fused_gelu", "stock_gelu"])
def test_gelu_backward(benchmark, gelu_inputs, name):
    leaves = [tensor.requires_grad_() for tensor in gelu_inputs]
    y = globals()[name](*leaves)
    dy = torch.randn_like(y)
    run(benchmark, lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))
