"""linear, linear_gelu and linear_norm: the product and the op after it, whoever adds the bias."""

import re

import pytest
import torch
import torch.nn.functional as F

from bertfast.ops import linear, linear_gelu, linear_norm
from bertfast.testing.budget import UNIT_ROUNDOFF

ROWS, INPUTS, OUTPUTS = 12, 48, 64


@pytest.fixture(params=["linear", "gelu", "tanh", "norm", "dropout"])
def form(request):
    return request.param


def tensors(device, dtype):
    """x, weight, bias, norm_weight, norm_bias, residual, and the gradient that comes in."""
    shapes = ((3, 4, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,), (OUTPUTS,), (OUTPUTS,))
    shapes += ((3, 4, OUTPUTS),) * 2
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def ours(form, given, backend):
    x, weight, bias, norm_weight, norm_bias, residual = given
    if form == "linear":
        return linear(x, weight, bias, backend=backend)
    if form in ("gelu", "tanh"):
        approximate = "none" if form == "gelu" else "tanh"
        return linear_gelu(x, weight, bias, approximate=approximate, backend=backend)
    options = dict(residual=residual, eps=1e-5, backend=backend)
    if form == "dropout":
        options |= dict(dropout_p=0.25, seed=torch.tensor([5], device=x.device), site=2)
    return linear_norm(x, weight, bias, norm_weight, norm_bias, **options)


def stock(form, given):
    """In the tensors' own dtype; in float64 the oracle."""
    from bertfast.ops import dropout_keep_mask

    x, weight, bias, norm_weight, norm_bias, residual = given
    y = F.linear(x, weight, bias)
    if form == "linear":
        return y
    if form in ("gelu", "tanh"):
        return F.gelu(y, approximate="none" if form == "gelu" else "tanh")
    if form == "dropout":
        keep = dropout_keep_mask(torch.tensor([5], device=x.device), 2, y.shape, 0.25, "row")
        y = y * keep / 0.75
    return F.layer_norm(y + residual, (OUTPUTS,), norm_weight, norm_bias, 1e-5)


def results(function, given, dy):
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y = function(leaves)
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def check(form, found, given, dy, dtype):
    """Each error is at most twice that of stock torch in the same dtype, and of one rounding."""
    exact = results(lambda t: stock(form, t), [t.double() for t in given], dy.double())
    yardstick = results(lambda t: stock(form, t), given, dy)
    assert len(found) == len(exact) == len(yardstick)
    for mine, other, right in zip(found, yardstick, exact, strict=True):
        scale = right.abs().max()
        error, allowed = ((value.double() - right).abs().max() for value in (mine, other))
        assert error <= 2 * (allowed + UNIT_ROUNDOFF[dtype] * scale)


def test_numbers_by_kernels(form, target, need):
    for op in ("layer_norm", "bias_gelu"):
        need(op, target)
    backend, device = target
    *given, dy = tensors(device, torch.bfloat16)
    found = results(lambda t: ours(form, t, backend), given, dy)
    check(form, found, given, dy, torch.bfloat16)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_numbers_by_torch(form, backend):
    *given, dy = tensors("cpu", torch.float32)
    found = results(lambda t: ours(form, t, backend), given, dy)
    check(form, found, given, dy, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(form, target, need, dtype):
    """Products have the 16-bit dtype, the norm keeps the stream's float32."""
    for op in ("layer_norm", "bias_gelu"):
        need(op, target)
    backend, device = target
    *given, dy = tensors(device, torch.float32)
    with torch.autocast(device, dtype=dtype):
        y = ours(form, given, backend)
    assert y.dtype == (torch.float32 if form in ("norm", "dropout") else dtype)
    right = stock(form, [tensor.double() for tensor in given])
    with torch.autocast(device, dtype=dtype):
        other = stock(form, given)
    u, scale = UNIT_ROUNDOFF[dtype], right.abs().max()
    error, allowed = ((value.double() - right).abs().max() for value in (y, other))
    assert error <= 2 * (allowed + u * scale)


def test_without_a_bias(form, target, need):
    for op in ("layer_norm", "bias_gelu"):
        need(op, target)
    backend, device = target
    *given, _ = tensors(device, torch.bfloat16)
    zeros = [*given[:2], torch.zeros_like(given[2]), *given[3:]]
    given[2] = None
    assert torch.equal(ours(form, given, backend), ours(form, zeros, backend))


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=[1.0]), TypeError, "x must be"),
        (dict(x=torch.ones(2, 5)), ValueError, "weight must have shape [outputs, inputs]"),
        (dict(weight=torch.ones(3)), ValueError, "weight must have shape [outputs, inputs]"),
        (dict(weight=torch.ones(3, 4).half()), TypeError, "weight must have dtype torch.float32"),
        (dict(bias=torch.ones(4)), ValueError, "bias must have shape [3], got [4]"),
        (dict(bias=torch.ones(3).double()), TypeError, "bias must have dtype torch.float32"),
        (dict(backend="cudnn"), ValueError, "backend must be one of"),
    ],
)
@pytest.mark.parametrize("function", [linear, linear_gelu, linear_norm], ids=lambda f: f.__name__)
def test_bad_arguments(function, change, error, text):
    given = dict(x=torch.ones(2, 4), weight=torch.ones(3, 4), bias=torch.ones(3), **{})
    if function is linear_norm:
        given |= dict(norm_weight=torch.ones(3), norm_bias=torch.ones(3))
        given |= dict(residual=torch.ones(2, 3))
    function(**given)
    with pytest.raises(error, match=re.escape(text)):
        function(**(given | change))


def test_a_backend_that_cannot_run_raises():
    x = torch.ones(2, 4, dtype=torch.float64)
    weight = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="can't run bias_gelu here"):
        linear_gelu(x, weight, backend="cuda")


def test_no_rows(form):
    *given, _ = tensors("cpu", torch.float32)
    given[0], given[5] = given[0][:0], given[5][:0]
    assert ours(form, given, "auto").shape == (0, 4, OUTPUTS)


def test_it_compiles_in_one_graph(form):
    *given, _ = tensors("cpu", torch.float32)
    options = dict(backend="eager", fullgraph=True)
    compiled = torch.compile(lambda given: ours(form, given, "auto"), **options)
    torch.testing.assert_close(compiled(given), ours(form, given, "torch"), rtol=0, atol=2e-5)


def test_masks_are_torchs_on_a_cpu():
    """Unless a backend or a seed asks for others."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 32), torch.randn(32, 32)
    bias, one, zero = torch.randn(32), torch.ones(32), torch.zeros(32)
    torch.manual_seed(1)
    y = linear_norm(x, weight, bias, one, zero, residual=x, dropout_p=0.5)
    torch.manual_seed(1)
    z = F.dropout(F.linear(x, weight, bias), 0.5) + x
    torch.testing.assert_close(y, F.layer_norm(z, (32,), eps=1e-12))
