"""layer_norm on every backend: the case table against float64, and properties."""

import inspect
import sys
import typing
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.guard import run_guarded

from bertfast.ops import layer_norm, rms_norm
from bertfast.testing import UNIT_ROUNDOFF, compare, hold_to_budget, worst
from bertfast.testing import layer_norm as table
from bertfast.testing.layer_norm import Case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


@dtypes
@pytest.mark.parametrize("case", table.cases(), ids=str)
def test_kernels_stay_within_the_error_budget(case, dtype, target, need):
    need("layer_norm", target)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, run_guarded(table.run, inputs, target))


@dtypes
@pytest.mark.parametrize("case", table.further_cases(), ids=str)
def test_further_forms_stay_within_the_error_budget(case, dtype, target, need):
    need("layer_norm", target)
    inputs = table.make_inputs(case, dtype)
    actual = run_guarded(table.run, inputs, target)
    hold_to_budget(table, inputs, actual)
    assert ("sum" in actual) == case.return_sum


@pytest.mark.parametrize("case", table.mixed_cases(), ids=str)
def test_16_bit_x_in_a_float32_stream(case, target, need):
    need("layer_norm", target)
    inputs = table.make_inputs(case, torch.float32)
    actual = run_guarded(table.run, inputs, target)
    hold_to_budget(table, inputs, actual)
    assert actual["y"].dtype == torch.float32
    assert actual["dx"].dtype == inputs["x"].dtype


@pytest.mark.parametrize("case", table.cases() + table.further_cases(), ids=str)
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


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        ("bf16 statistics", Case((9, 768), values="offset")),
        ("fp16 partial sums", Case((301, 384))),
    ],
    ids=str,
)
def test_budget_catches_a_planted_precision_fault(fault, case):
    inputs = table.make_inputs(case, torch.float16)

    def sum_in_fp16(terms):
        total = torch.zeros(terms.shape[-1], dtype=torch.float16)
        for row in terms:
            total += row.half()
        return total

    good = table.rounding_model(inputs)
    if fault == "bf16 statistics":
        bad = table.rounding_model(inputs, statistics=lambda t: t.bfloat16().float())
    else:
        bad = table.rounding_model(inputs, column_sum=sum_in_fp16)
    oracle, scales = table.oracle(inputs), table.scales(inputs)
    assert worst(compare(good, oracle, good, scales)).ok
    assert not worst(compare(bad, oracle, good, scales)).ok


def test_a_value_that_is_not_finite_fails_the_budget():
    inputs = table.make_inputs(Case((3, 64)), torch.float32)
    good = table.rounding_model(inputs)
    for spoil in (good["y"], good["dx"]):
        spoilt = {name: value.clone() for name, value in good.items()}
        name = next(name for name, value in good.items() if value is spoil)
        spoilt[name][0, 0] = torch.nan
        assert not worst(compare(spoilt, table.oracle(inputs), good)).ok
        assert not worst(compare(good, table.oracle(inputs), spoilt)).ok


# Properties.


def test_shift_invariance_and_unit_variance(target, need):
    need("layer_norm", target)
    backend, device = target
    x = torch.randn(6, 768, device=device)
    one, zero = torch.ones(768, device=device), torch.zeros(768, device=device)
    y = layer_norm(x, one, zero, backend=backend)
    shifted = layer_norm(x + 64.0, one, zero, backend=backend)
    # Adding 64 rounds each value of x to a multiple of 2^-17; y changes by that times rstd.
    assert (y - shifted).abs().max() < 2.0**-17 * 1.5
    assert y.mean(-1).abs().max() < 1e-6
    assert (y.var(-1, unbiased=False) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("width", [384, 513])
def test_rows_do_not_see_each_other(target, need, width):
    need("layer_norm", target)
    inputs = table.make_inputs(Case((21, width), p=0.1), torch.float16)
    clean = table.run(inputs, *target)
    spoilt = dict(inputs, x=inputs["x"].clone(), residual=inputs["residual"].clone())
    spoilt["x"][7] = torch.nan
    spoilt["residual"][20] = torch.inf
    others = [row for row in range(21) if row not in (7, 20)]
    dirty = table.run(spoilt, *target)
    for name in ("y", "dx", "dresidual"):
        assert torch.equal(clean[name][others], dirty[name][others]), name
    assert dirty["y"][7].isnan().all()


def test_what_is_dropped_does_not_survive(target, need):
    need("layer_norm", target)
    backend, device = target
    from bertfast.ops import dropout_keep_mask

    seed = torch.tensor([7], device=device)
    keep = dropout_keep_mask(seed, 0, (4, 64), 0.5, "row")
    x = torch.where(keep, torch.randn(4, 64, device=device), torch.inf)
    one = torch.ones(64, device=device)
    y = layer_norm(x, one, one, dropout_p=0.5, seed=seed, backend=backend)
    assert y.isfinite().all()


@dtypes
def test_same_bits_every_run_and_with_and_without_gradients(target, need, dtype):
    need("layer_norm", target)
    backend, device = target
    inputs = table.make_inputs(Case((45, 768), p=0.1), dtype)
    first, second = table.run(inputs, *target), table.run(inputs, *target)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    arguments = {name: inputs[name].to(device) for name in (*table.NAMES, "seed") if name in inputs}
    with torch.no_grad():
        y = layer_norm(
            **arguments, eps=inputs["eps"], dropout_p=0.1, site=inputs["site"], backend=backend
        )
    assert torch.equal(y, first["y"])


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "wanted",
    [("x",), ("residual",), ("weight",), ("bias",), ("x_bias",), ("x", "bias"), ("x_bias", "x")],
    ids=lambda wanted: "+".join(wanted),
)
def test_any_subset_of_gradients(target, need, wanted, p):
    need("layer_norm", target)
    backend, device = target
    inputs = table.make_inputs(Case((19, 384), p=p), torch.float32)
    everything = table.run(inputs, *target)
    leaves = {name: inputs[name].to(device).clone() for name in table.NAMES}
    for name in wanted:
        leaves[name].requires_grad_()
    y = layer_norm(
        **leaves,
        eps=inputs["eps"],
        dropout_p=p,
        seed=inputs["seed"].to(device),
        site=inputs["site"],
        backend=backend,
    )
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], inputs["dy"].to(device))
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, everything[f"d{name}"]), name


def test_plain_layer_norm_saves_its_input_and_not_a_copy(target, need):
    need("layer_norm", target)
    backend, device = target
    x = torch.randn(3, 64, device=device, requires_grad=True)
    one = torch.ones(64, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_norm(x, one, one, backend=backend)
    assert x.data_ptr() in [tensor.data_ptr() for tensor in saved]
    stored = sum(t.numel() for t in saved if t.data_ptr() not in (x.data_ptr(), one.data_ptr()))
    assert stored == 6  # mean and rstd of three rows


def test_checkpointing_recomputes_the_same_dropout(target, need):
    need("layer_norm", target)
    from torch.utils.checkpoint import checkpoint

    backend, device = target
    one = torch.ones(96, device=device)

    def block(x):
        return layer_norm(x, one, one, residual=x, dropout_p=0.4, backend=backend)

    x = torch.randn(5, 96, device=device, requires_grad=True)
    dy = torch.randn(5, 96, device=device)
    for reentrant in (False, True):
        torch.manual_seed(3)
        plain = torch.autograd.grad(block(x), x, dy)[0]
        torch.manual_seed(3)
        x.grad = None
        checkpoint(block, x, use_reentrant=reentrant).backward(dy)
        assert torch.equal(x.grad, plain)


def test_reference_gradients_in_float64():
    case = Case((3, 5), p=0.3, eps=1e-5)
    inputs = table.make_inputs(case, torch.float32)
    leaves = [inputs[name].double().requires_grad_() for name in table.NAMES]

    def f(x, weight, bias, residual, x_bias):
        return layer_norm(
            x,
            weight,
            bias,
            residual=residual,
            x_bias=x_bias,
            eps=case.eps,
            dropout_p=case.p,
            seed=inputs["seed"],
        )

    assert torch.autograd.gradcheck(f, leaves)


# Autocast: torch's layer_norm runs in float32 there, whatever comes in.


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("backend", ["torch", "target"])
def test_autocast_gives_the_dtypes_of_torch(target, need, residual_dtype, backend):
    need("layer_norm", target)
    name, device = target
    name = "torch" if backend == "torch" else name

    def leaves():
        torch.manual_seed(1)
        x = torch.randn(4, 384, device=device).bfloat16().requires_grad_()
        residual = torch.randn(4, 384, device=device)
        residual = residual.to(residual_dtype or torch.float32).requires_grad_()
        weight = torch.rand(384, device=device).requires_grad_()
        bias = torch.rand(384, device=device).requires_grad_()
        return x, residual, weight, bias

    def grads(y, tensors):
        return torch.autograd.grad(y.float().square().sum(), tensors, materialize_grads=True)

    ours, theirs = leaves(), leaves()
    with torch.autocast(device, dtype=torch.bfloat16):
        residual = ours[1] if residual_dtype else None
        y = layer_norm(ours[0], ours[2], ours[3], residual=residual, eps=1e-5, backend=name)
        z = theirs[0] + theirs[1] if residual_dtype else theirs[0]
        stock = F.layer_norm(z, (384,), theirs[2], theirs[3], 1e-5)
    assert y.dtype == stock.dtype
    # Stock rounds z = x + residual to bfloat16 if both are, by up to u |z|; we don't. With weights
    # up to 1 and a deviation above 1 the output differs by less than that; the mean hardly moves.
    # Where the output is bfloat16 it is rounded too, by each.
    z = z.detach().float()
    assert residual_dtype is None or z.std(-1).min() > 1.1
    u = UNIT_ROUNDOFF[torch.bfloat16]
    rounding = u * z.abs().max() if residual_dtype == torch.bfloat16 else 0.0
    rounding += 2 * u * y.abs().max() if y.dtype == torch.bfloat16 else 0.0
    assert (y - stock).abs().max() < rounding + 1e-5
    for mine, other in zip(grads(y, ours), grads(stock, theirs), strict=True):
        assert mine.dtype == other.dtype


# What only the host build can show.


@pytest.mark.host
@pytest.mark.parametrize("case", [Case((9, 384), p=0.1), Case((5, 768)), Case((3, 2056))], ids=str)
def test_same_bits_in_every_scheduling_order(host_runtime, case):
    results = []
    for order, seed in (("depth-first", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        host_runtime.set_schedule(order, seed)
        inputs = table.make_inputs(case, torch.float16)
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


@pytest.mark.host
@dtypes
@pytest.mark.parametrize("width", [384, 512, 768, 1024, 2048, 8192, 1023])
def test_no_bank_conflicts(host_runtime, dtype, width):
    host_runtime.reset_records()
    table.run(table.make_inputs(Case((9, width), p=0.1), dtype), "cuda")
    records = host_runtime.bank_conflicts()
    assert records, "nothing was recorded"
    assert [r for r in records if r[1] > 1] == []


@pytest.mark.parametrize("function", [layer_norm, rms_norm])
def test_options_for_type_checkers_are_the_functions_own(function):
    """return_sum decides whether the result is a tensor or a pair; overloads say so of the rest."""
    own = inspect.signature(function).parameters.values()
    named = {one.name: one.annotation for one in own if one.kind is one.KEYWORD_ONLY}
    assert named.pop("return_sum") is bool
    assert named == typing.get_type_hints(sys.modules[layer_norm.__module__]._Options)


def test_case_names_are_unique():
    for cases in (table.cases(), table.mixed_cases(), table.quick_cases()):
        assert len({str(case) for case in cases}) == len(cases)
    assert str(replace(cases[0], p=0.25)) != str(cases[0])
