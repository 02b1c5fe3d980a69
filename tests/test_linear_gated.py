"""linear_gated in one kernel on every backend: the case table against float64, and properties."""

import pytest
import torch
from support.guard import run_guarded

from bertfast.ops import dispatch, gated, linear_gated
from bertfast.ops.gated.limits import ACTIVATIONS
from bertfast.testing import UNIT_ROUNDOFF, compare, hold_to_budget, worst
from bertfast.testing import linear_gated as table
from bertfast.testing.linear_gated import Case

DTYPES = [torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@dtypes
def test_kernels_stay_within_the_error_budget(dtype, target, need):
    need("linear_gated", target, dtype)
    # The interpreter takes a tenth of a second for a case: in bfloat16 the quick ones.
    quick = target == ("triton", "cpu") and dtype == torch.bfloat16
    for case in table.quick_cases() if quick else table.cases():
        inputs = table.make_inputs(case, dtype)
        try:
            hold_to_budget(table, inputs, run_guarded(table.run, inputs, target))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@dtypes
def test_two_kernels_stay_within_the_same_budget(dtype):
    """torch's product and its activation, each rounding once, as a layer without a GPU does."""
    for case in table.cases():
        inputs = table.make_inputs(case, dtype)
        try:
            hold_to_budget(table, inputs, table.run(inputs, "torch"))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@dtypes
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backends_op_after_the_product_stays_within_it(name, dtype, need):
    """Two kernels of any backend that has gated, one of neither."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    need("gated", (name, device), dtype)
    for case in (Case(70, 96, 104, kernels=2), Case(33, 40, 72, activation="silu", kernels=2)):
        inputs = table.make_inputs(case, dtype)
        hold_to_budget(table, inputs, run_guarded(table.run, inputs, (name, device)))


def _sum_in_fp16(terms):
    total = torch.zeros(terms.shape[-1], dtype=torch.float16)
    for row in terms:
        total += row.half()
    return total


def _product_in_fp16(a, b):
    """Sums of eight terms, rounded to float16 one after the other."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float16)
    for first in range(0, a.shape[1], 8):
        total += (a[:, first : first + 8] @ b[first : first + 8]).half()
    return total.float()


FAULTS = {
    "tanh instead of erf": dict(activation="gelu_tanh"),
    "silu instead of gelu": dict(activation="silu"),
    "fp16 partial sums of dbias": dict(column_sum=_sum_in_fp16),
    "fp16 sums of a product": dict(product=_product_in_fp16),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_budget_catches_a_planted_precision_fault(fault):
    # Where y is of the size of 1, tanh's error hides behind float16's rounding; in the tail not.
    values = "tail" if fault.startswith("tanh") else "normal"
    inputs = table.make_inputs(Case(301, 264, 136, values=values), torch.float16)
    good, bad = table.rounding_model(inputs), table.rounding_model(inputs, **FAULTS[fault])
    oracle, scales = table.oracle(inputs), table.scales(inputs)
    assert worst(compare(good, oracle, good, scales)).ok
    assert not worst(compare(bad, oracle, good, scales)).ok


def test_case_names_are_unique():
    for cases in (table.cases(), table.quick_cases()):
        assert len({str(case) for case in cases}) == len(cases)


@dtypes
@activations
def test_y_has_the_bits_of_gated_of_the_stored_u(activation, dtype, target, need):
    """So the backward, which computes from u, belongs to what the forward gave."""
    need("linear_gated", target, dtype)
    inputs = table.make_inputs(Case(70, 96, 104, activation=activation), dtype)
    y, u = table.up(inputs, *target)
    bias = inputs["bias"].to(u.device)
    assert torch.equal(y, gated(u, bias, activation=activation, backend=target[0]))


@dtypes
def test_same_bits_every_run_and_with_and_without_u(dtype, target, need):
    need("linear_gated", target, dtype)
    inputs = table.make_inputs(Case(133, 72, 72), dtype)
    first, second = table.run(inputs, *target), table.run(inputs, *target)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    y, u = table.up(inputs, *target, save=False)
    assert u is None and torch.equal(y, first["y"])


def test_a_nan_or_inf_stays_in_its_row(target, need):
    need("linear_gated", target, torch.float16)
    inputs = table.make_inputs(Case(45, 40, 136), torch.float16)
    clean = table.run(inputs, *target)
    spoilt = dict(inputs, x=inputs["x"].clone(), dy=inputs["dy"].clone())
    spoilt["x"][7, 3] = spoilt["dy"][44, 39] = torch.nan
    dirty = table.run(spoilt, *target)
    for name, row in (("y", 7), ("u", 7), ("du", 44)):
        differs = (clean[name] != dirty[name]).any(1).nonzero().flatten().tolist()
        assert differs == [row] and dirty[name][row].isnan().all(), name
    assert dirty["dbias"].isnan().all()


def test_a_bias_that_is_not_finite_stays_in_its_columns(target, need):
    """Rows of a tile beyond the last one must not add to the sums."""
    need("linear_gated", target, torch.float16)
    inputs = table.make_inputs(Case(45, 40, 136), torch.float16)
    clean = table.run(inputs, *target)
    spoilt = dict(inputs, bias=inputs["bias"].clone())
    spoilt["bias"][3] = -torch.inf  # there GELU and its slope are 0
    spoilt["bias"][136 + 135] = torch.inf
    dirty = table.run(spoilt, *target)
    differs = (clean["y"] != dirty["y"]).any(0).nonzero().flatten().tolist()
    assert differs == [3, 135] and (dirty["y"][:, 3] == 0).all()
    differs = (clean["du"] != dirty["du"]).any(0).nonzero().flatten().tolist()
    assert differs == [3, 135, 136 + 3]
    assert (dirty["dbias"][[3, 136 + 3]] == 0).all()


@dtypes
def test_the_gradient_of_bias_is_a_sum_of_unrounded_values(dtype, target, need):
    """Values of one size and both signs, of which each rounds to one: only their rests are left."""
    need("linear_gated", target, dtype)
    inputs = table.make_inputs(Case(200, 8, 24, bias=True), dtype)
    rest = torch.finfo(dtype).eps / 4
    inputs["bias"].zero_()
    inputs["u"][:, :24], inputs["u"][:, 24:] = 16.0, 1.0  # GELU's slope is one there
    inputs["down"].zero_()
    inputs["down"][0], inputs["down"][1] = 1.0, rest
    inputs["dy"].zero_()
    inputs["dy"][:, :2] = torch.tensor([[1.0, 1.0], [-1.0, 0.5]]).repeat(100, 1)
    gate, value = table.run(inputs, *target)["dbias"].double().cpu().chunk(2)
    for found, factor in ((gate, 1), (value, 16)):
        assert (found / (150 * rest * factor) - 1).abs().max() <= 2 * UNIT_ROUNDOFF[dtype]


def test_other_dtypes_and_widths_have_a_reason(target, need):
    need("linear_gated", target)
    reason = dispatch.unsupported_reason("linear_gated", *target, torch.float32)
    assert reason == "its tensor-core kernels take float16 and bfloat16, got torch.float32"
    case = (torch.float16, 64, 2**23 + 8)
    reason = dispatch.unsupported_reason("linear_gated", *target, *case)
    assert reason == f"outputs must be at most {2**23}, got {2**23 + 8}"


@pytest.mark.parametrize("gap", [0, 8], ids=["not aligned", "rows apart"])
def test_u_may_lie_elsewhere_than_it_was_put(gap, target, need):
    """A hook on saved tensors gives back a tensor of its own."""
    need("linear_gated", target, torch.float16)
    inputs = table.make_inputs(Case(37, 40, 72), torch.float16)
    moved = torch.empty(37 * (144 + gap) + 1, dtype=torch.float16)[1:].view(37, 144 + gap)[:, :144]
    moved.copy_(inputs["u"])
    first, second = (table.run(inputs | {"u": u}, *target) for u in (inputs["u"], moved))
    assert torch.equal(first["du"], second["du"]) and torch.equal(first["dbias"], second["dbias"])


# The public function


def _leaves(dtype, device="cpu", rows=(3, 5), inputs=32, width=64):
    """Quarters below 8: a sum of 32 products is a multiple of 1/16, and of few digits, so it is the
    same in every order."""

    def leaf(*shape):
        quarters = torch.randn(shape, device=device).mul(4).round().div(4)
        return quarters.to(dtype).requires_grad_()

    return leaf(*rows, inputs), leaf(2 * width, inputs), leaf(2 * width)


@dtypes
@activations
def test_one_kernel_and_two_have_the_same_bits(activation, dtype, target, need):
    """Output and gradients, where the product's sums are exact."""
    need("linear_gated", target, dtype)
    backend, device = target
    given = _leaves(dtype, device)
    dy = torch.randn(3, 5, 64, device=device).to(dtype)
    results = []
    for fused in (True, False):
        y = linear_gated(*given, activation=activation, fused=fused, backend=backend)
        results.append((y, *torch.autograd.grad(y, given, dy)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("bias", [True, False])
@activations
def test_without_kernels_it_is_the_product_and_gated(activation, bias):
    for dtype in (torch.float32, torch.float64):
        x, weight, b = _leaves(dtype)
        b = b if bias else None
        y = linear_gated(x, weight, b, activation=activation, backend="torch")
        both = torch.nn.functional.linear(x, weight, b)
        assert torch.equal(y, gated(both, activation=activation, backend="torch"))
        assert torch.equal(y, linear_gated(x, weight, b, activation=activation, training=True))


def test_autocast_rounds_the_operands(target, need):
    need("linear_gated", target, torch.bfloat16)
    backend, device = target
    x, weight, bias = (leaf.detach() for leaf in _leaves(torch.float32, device))
    with torch.autocast(device, torch.bfloat16):
        one, two = (linear_gated(x, weight, bias, fused=f, backend=backend) for f in (True, False))
    assert one.dtype == torch.bfloat16 and torch.equal(one, two)


def test_no_rows(target, need):
    need("linear_gated", target, torch.float16)
    backend, device = target
    given = _leaves(torch.float16, device, rows=(2, 0))
    y = linear_gated(*given, fused=True, backend=backend)
    assert y.shape == (2, 0, 64)
    y.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in given[1:])


ERRORS = [
    (dict(weight=torch.zeros(7, 8), bias=None), ValueError, "weight must have an even number of"),
    (dict(weight=torch.zeros(6, 9)), ValueError, "weight must have shape"),
    (dict(bias=torch.zeros(3)), ValueError, "bias must have shape"),
    (dict(activation="relu"), ValueError, "activation must be"),
    (dict(fused=1), TypeError, "fused must be"),
    (dict(backend="cublas"), ValueError, "backend must be"),
    (dict(x=torch.zeros(2, 8, dtype=torch.int64)), TypeError, "x must have dtype"),
    (
        dict(fused=True, backend="torch"),
        ValueError,
        "fused=True can't be had here: torch: its product and its activation are two",
    ),
    (dict(fused=True), ValueError, "fused=True can't be had here: triton: .*; cuda: "),
]


@pytest.mark.parametrize(("change", "error", "text"), ERRORS, ids=lambda v: str(v)[:24])
def test_error_text(change, error, text):
    given = dict(x=torch.zeros(2, 8), weight=torch.zeros(6, 8), bias=torch.zeros(6))
    with pytest.raises(error, match=text):
        linear_gated(**(given | change))


def test_a_width_that_the_kernel_cannot_have(target, need):
    need("linear_gated", target, torch.float16)
    x, weight = (torch.zeros(size, 8, dtype=torch.float16) for size in (2, 24))
    text = f"{target[0]}: outputs must be a multiple of 8 between 8 and 16777216, got 12"
    with pytest.raises(ValueError, match=text):
        linear_gated(x.to(target[1]), weight.to(target[1]), fused=True, backend=target[0])
