"""bias_gelu on every backend: the case table against float64, and properties."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.guard import run_guarded

from bertfast.ops import bias_gelu
from bertfast.ops.bias_gelu import coefficients, fit
from bertfast.testing import UNIT_ROUNDOFF, compare, hold_to_budget, worst
from bertfast.testing import bias_gelu as table
from bertfast.testing.bias_gelu import Case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
approximations = pytest.mark.parametrize("approximate", ["none", "tanh"])


def derivative(v, approximate):
    """In float64."""
    v = v.detach().double().requires_grad_()
    return torch.autograd.grad(F.gelu(v, approximate=approximate).sum(), v)[0]


@dtypes
@pytest.mark.parametrize("case", table.cases(), ids=str)
def test_kernels_stay_within_the_error_budget(case, dtype, target, need):
    need("bias_gelu", target)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, run_guarded(table.run, inputs, target))


@pytest.mark.parametrize("case", table.mixed_cases(), ids=str)
def test_16_bit_x_with_a_float32_bias(case, target, need):
    need("bias_gelu", target)
    inputs = table.make_inputs(case, torch.float32)
    actual = run_guarded(table.run, inputs, target)
    hold_to_budget(table, inputs, actual)
    assert actual["y"].dtype == actual["dbias"].dtype == torch.float32
    assert actual["dx"].dtype == inputs["x"].dtype


@dtypes
def test_many_rows_take_every_step_of_a_program(target, need, dtype):
    need("bias_gelu", target)
    inputs = table.make_inputs(Case((300, 40)), dtype)
    hold_to_budget(table, inputs, run_guarded(table.run, inputs, target))


@pytest.mark.triton
@dtypes
def test_triton_programs_that_take_the_steps_of_a_large_tensor(monkeypatch, dtype):
    triton = pytest.importorskip("bertfast.ops.bias_gelu.triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = triton.backward_config(40, dtype.itemsize, 2**24)
    assert config.steps > triton.backward_config(40, dtype.itemsize, 600).steps
    monkeypatch.setattr(triton, "backward_config", lambda *case: config)
    inputs = table.make_inputs(Case((600, 40)), dtype)
    hold_to_budget(table, inputs, run_guarded(table.run, inputs, ("triton", device)))


@pytest.mark.parametrize("case", table.cases(), ids=str)
def test_torch_backend_in_float32_is_stock_torch(case):
    inputs = table.make_inputs(case, torch.float32)
    stock = table.plain_torch(inputs)
    for name, value in table.run(inputs, "torch").items():
        assert torch.equal(value, stock[name]), name


@dtypes
@pytest.mark.parametrize("case", table.quick_cases(), ids=str)
def test_torch_backend_stays_within_the_error_budget(case, dtype):
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, "torch"))


@pytest.mark.parametrize("fault", ["tanh instead of erf", "fp16 partial sums"])
def test_budget_catches_a_planted_precision_fault(fault):
    # Where y is of the size of 1, tanh's error hides behind float16's rounding; in the tail not.
    values = "tail" if fault.startswith("tanh") else "normal"
    inputs = table.make_inputs(Case((301, 384), values=values), torch.float16)

    def sum_in_fp16(terms):
        total = torch.zeros(terms.shape[-1], dtype=torch.float16)
        for row in terms:
            total += row.half()
        return total

    good = table.rounding_model(inputs)
    if fault == "tanh instead of erf":
        bad = table.rounding_model(inputs, approximate="tanh")
    else:
        bad = table.rounding_model(inputs, column_sum=sum_in_fp16)
    oracle = table.oracle(inputs)
    assert worst(compare(good, oracle, good)).ok
    assert not worst(compare(bad, oracle, good)).ok


# The polynomials.


@pytest.mark.parametrize("one", fit.FITS, ids=lambda one: one.name)
def test_the_committed_polynomials_are_what_the_fit_finds(one):
    committed = getattr(coefficients, one.name)
    assert len(committed) == one.degree + 1
    _, error = fit.solve(one)
    # Another linear algebra library may end elsewhere, and be rounded otherwise, by a little.
    assert fit.weighted_error(one, committed) <= 1.5 * error


def test_cuda_and_triton_have_the_same_polynomials():
    header = Path(__file__).parents[1] / "csrc" / "device" / "gelu_coefficients.cuh"
    if not header.exists():
        pytest.skip("csrc is not here")
    committed = {one.name: getattr(coefficients, one.name) for one in fit.FITS}
    assert header.read_text() == fit.cuda_text(committed)
    assert Path(coefficients.__file__).read_text() == fit.python_text(committed)


def _horner(z, polynomial):
    """In float32 with fused multiply-adds, as a GPU evaluates it."""
    value = np.full_like(z, np.float32(polynomial[-1]))
    for c in polynomial[-2::-1]:
        value = (value.astype(float) * z + np.float32(c)).astype(np.float32)
    return value


def _every_float16():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    return values[np.isfinite(values)]


def _gelu(v):
    """In float64, without cancellation in the tail."""
    return np.maximum(v, 0) - np.abs(v) * fit.upper_tail(np.abs(v))


def _in_ulp(actual, v):
    exact = _gelu(v.astype(float))
    return np.abs(actual.astype(float) - exact) / fit.float16_ulp(exact)


# 2^-22 is the largest relative error that the PTX manual states for ex2.approx.
@pytest.mark.parametrize("off", [0.0, 2.0**-22, -(2.0**-22), "random"])
def test_every_float16_value_is_within_0_6_ulp_with_an_approximate_exp2(off):
    x = _every_float16().astype(np.float32)
    if off == "random":
        off = np.random.default_rng(0).uniform(-(2.0**-22), 2.0**-22, len(x))
    z = np.minimum(np.abs(x), np.float32(coefficients.LIMIT))
    share = np.exp2(_horner(z, coefficients.FORWARD_16).astype(float)) * (1 + off)
    share = share.astype(np.float32).astype(float)
    y = (np.maximum(x, 0) - z * share).astype(np.float32).astype(np.float16)
    assert _in_ulp(y, x).max() <= 0.6


def test_every_float16_value_is_within_0_6_ulp(target, need):
    need("bias_gelu", target)
    x = _every_float16()
    y = bias_gelu(torch.from_numpy(x).to(target[1]), backend=target[0]).cpu().numpy()
    assert _in_ulp(y, x).max() <= 0.6


def test_the_derivative_at_every_float16_value(target, need):
    need("bias_gelu", target)
    x = torch.from_numpy(_every_float16())
    leaf = x.to(target[1], copy=True).requires_grad_()
    y = bias_gelu(leaf, backend=target[0])
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    exact = derivative(x, "none")
    # Half an ulp of rounding, a tenth of the polynomial's; near the zero crossing, and in the
    # tail, the error is absolute.
    ulp = torch.from_numpy(fit.float16_ulp(np.maximum(exact.abs().numpy(), 1e-3)))
    assert ((dx.cpu().double() - exact).abs() / ulp).max() <= 0.6


@pytest.mark.parametrize("name", ["FORWARD_16", "FORWARD_32"])
def test_the_tail_falls_to_zero(name):
    z = np.linspace(0, coefficients.LIMIT, 4001).astype(np.float32)
    p = _horner(z, getattr(coefficients, name))
    assert (np.diff(p) < 0).all()
    assert p[-1] < -150  # half of float32's smallest subnormal: exp2 gives 0


# Properties.


@dtypes
@approximations
def test_special_values(target, need, dtype, approximate):
    """The limits at infinity, also where torch has NaN; NaN stays NaN; beyond the tail nothing."""
    need("bias_gelu", target)
    inf, nan, big = math.inf, math.nan, 6e4
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, big, -big, -20.0], dtype=dtype)
    leaf = x.to(target[1], copy=True).requires_grad_()
    y = bias_gelu(leaf, approximate=approximate, backend=target[0])
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    y, dx = y.detach().cpu(), dx.cpu()
    expected = torch.tensor([inf, 0, nan, 0, 0, big, 0, 0], dtype=dtype)
    assert torch.equal(y.nan_to_num(-1, posinf=inf), expected.nan_to_num(-1, posinf=inf))
    slope = torch.tensor([1, 0, nan, 0.5, 0.5, 1, 0, 0], dtype=dtype)
    assert torch.equal(
        dx.nan_to_num(-1)[[0, 1, 2, 5, 6, 7]], slope.nan_to_num(-1)[[0, 1, 2, 5, 6, 7]]
    )
    assert (dx[3:5] - 0.5).abs().max() <= UNIT_ROUNDOFF[dtype]
    # Where torch has a number, in float64, it is the same one.
    stock = F.gelu(x.double(), approximate=approximate).to(dtype)
    kept = ~stock.isnan()
    assert torch.equal(y[kept], stock[kept])
    assert not (y.isnan() & kept).any()


def test_a_nan_or_inf_stays_in_its_place(target, need):
    need("bias_gelu", target)
    inputs = table.make_inputs(Case((45, 80)), torch.float16)
    clean = table.run(inputs, *target)
    spoilt = dict(inputs, x=inputs["x"].clone())
    spoilt["x"][7, 3], spoilt["x"][44, 79] = torch.nan, -torch.inf
    dirty = table.run(spoilt, *target)
    for name in ("y", "dx"):
        differs = (clean[name] != dirty[name]).nonzero().tolist()
        assert differs == [[7, 3], [44, 79]], name
    assert (clean["dbias"] != dirty["dbias"]).nonzero().flatten().tolist() == [3, 79]
    assert dirty["y"][44, 79] == 0 and dirty["dbias"][79].isfinite()


@dtypes
@approximations
def test_same_bits_every_run_and_with_and_without_gradients(target, need, dtype, approximate):
    need("bias_gelu", target)
    backend, device = target
    inputs = table.make_inputs(Case((21, 384), approximate=approximate), dtype)
    first, second = table.run(inputs, *target), table.run(inputs, *target)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    x, bias = inputs["x"].to(device), inputs["bias"].to(device)
    with torch.no_grad():
        y = bias_gelu(x, bias, approximate=approximate, backend=backend)
    assert torch.equal(y, first["y"])


@pytest.mark.parametrize("wanted", [("x",), ("bias",)])
def test_any_subset_of_gradients(target, need, wanted):
    need("bias_gelu", target)
    backend, device = target
    inputs = table.make_inputs(Case((19, 384)), torch.float32)
    everything = table.run(inputs, *target)
    leaves = {name: inputs[name].to(device).clone() for name in table.NAMES}
    for name in wanted:
        leaves[name].requires_grad_()
    y = bias_gelu(**leaves, backend=backend)
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], inputs["dy"].to(device))
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, everything[f"d{name}"]), name


def test_only_the_inputs_are_saved(target, need):
    need("bias_gelu", target)
    backend, device = target
    x = torch.randn(3, 64, device=device, requires_grad=True)
    bias = torch.ones(64, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_gelu(x, bias, backend=backend)
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), bias.data_ptr()}


def test_the_same_tensor_given_twice(target, need):
    need("bias_gelu", target)
    x = torch.randn(40, device=target[1], requires_grad=True)
    dy = torch.randn(40, device=target[1])
    (dx,) = torch.autograd.grad(bias_gelu(x, x, backend=target[0]), x, dy)
    assert (dx - 2 * dy * derivative(2 * x, "none")).abs().max() < 1e-5


def test_a_gradient_that_repeats_one_value(target, need):
    """The gradient that sum().backward() hands down has strides of zero."""
    need("bias_gelu", target)
    x = torch.randn(3, 40, device=target[1], requires_grad=True)
    bias = torch.randn(40, device=target[1], requires_grad=True)
    bias_gelu(x, bias, backend=target[0]).sum().backward()
    slope = derivative(x + bias, "none")
    assert (x.grad - slope).abs().max() < 1e-6
    assert (bias.grad - slope.sum(0)).abs().max() < 1e-5


def test_offsets_beyond_32_bits(target, need):
    need("bias_gelu", target)
    backend, device = target
    gap = 2**30  # the third row starts at element 2^31; what lies between is never touched
    x = torch.empty(2 * gap + 64, dtype=torch.float16, device=device).as_strided((3, 64), (gap, 1))
    values = torch.randn(3, 64, device=device, dtype=torch.float16)
    x.copy_(values)
    bias = torch.randn(64, device=device, dtype=torch.float16)
    results = []
    for tensor in (x, values):
        leaf = tensor.detach().requires_grad_()
        y = bias_gelu(leaf, bias, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaf, values)))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)


@pytest.mark.parametrize("with_bias", [True, False])
def test_tensors_that_start_anywhere(target, need, with_bias):
    """One element into their memory: 16-byte accesses are not possible."""
    need("bias_gelu", target)

    def off(*shape):
        return torch.randn(math.prod(shape) + 1, device=target[1]).half()[1:].view(shape)

    tensors = [off(5, 3, 256), off(256)] if with_bias else [off(5, 3, 256)]
    dy, results = off(5, 3, 256), []
    for copy in (torch.Tensor.detach, torch.Tensor.clone):
        leaves = [copy(tensor).requires_grad_() for tensor in tensors]
        y = bias_gelu(*leaves, backend=target[0])
        results.append((y, *torch.autograd.grad(y, leaves, copy(dy))))
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)


@approximations
def test_reference_gradients_in_float64(approximate):
    x, bias = torch.randn(3, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: bias_gelu(*v, approximate=approximate), (x, bias))


@pytest.mark.parametrize(
    ("x_dtype", "bias_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, None),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "target"])
def test_autocast_gives_the_dtypes_of_torch(target, need, x_dtype, bias_dtype, backend):
    need("bias_gelu", target)
    name, device = target
    name = "torch" if backend == "torch" else name

    def leaves():
        torch.manual_seed(1)
        x = torch.randn(4, 96, device=device).to(x_dtype).requires_grad_()
        if bias_dtype is None:
            return (x,)
        return x, torch.randn(96, device=device).to(bias_dtype).requires_grad_()

    ours, theirs = leaves(), leaves()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = bias_gelu(*ours, backend=name)
        stock = F.gelu(sum(theirs[1:], theirs[0]))
    assert y.dtype == stock.dtype
    # Two bfloat16 operands have their sum rounded by stock torch, and the output is by both.
    u = UNIT_ROUNDOFF[torch.bfloat16] if y.dtype == torch.bfloat16 else 0.0
    assert (y - stock).abs().max() <= 4 * u * stock.abs().max() + 1e-6
    dy = torch.randn_like(stock)
    for mine, other in zip(
        torch.autograd.grad(y, ours, dy), torch.autograd.grad(stock, theirs, dy), strict=True
    ):
        assert mine.dtype == other.dtype


# What only the host build can show.


@pytest.mark.host
@approximations
@pytest.mark.parametrize("shape", [(70, 1536), (9, 33), (3, 5, 24)], ids=str)
def test_same_bits_in_every_scheduling_order(host_runtime, shape, approximate):
    results = []
    for order, seed in (("depth-first", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        host_runtime.set_schedule(order, seed)
        inputs = table.make_inputs(Case(shape, approximate=approximate), torch.float16)
        results.append(table.run(inputs, "cuda"))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.host
@dtypes
@pytest.mark.parametrize("seed", range(3))
def test_budget_holds_when_approximations_are_off_by_their_documented_error(
    host_runtime, dtype, seed
):
    host_runtime.set_perturb(True, seed)
    for case in table.quick_cases():
        inputs = table.make_inputs(case, dtype)
        hold_to_budget(table, inputs, table.run(inputs, "cuda"))


def test_case_names_are_unique():
    for cases in (table.cases(), table.mixed_cases(), table.quick_cases()):
        assert len({str(case) for case in cases}) == len(cases)
