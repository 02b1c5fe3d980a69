"""linear_gelu in one kernel on every backend: the case table against float64, and properties."""

import pytest
import torch
from support.guard import run_guarded

from bertfast.ops import dispatch, linear_gelu
from bertfast.testing import UNIT_ROUNDOFF, compare, hold_to_budget, worst
from bertfast.testing import linear_gelu as table
from bertfast.testing.linear_gelu import Case

DTYPES = [torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])


@dtypes
@pytest.mark.parametrize("case", table.cases(), ids=str)
def test_kernels_stay_within_the_error_budget(case, dtype, target, need):
    need("linear_gelu", target, dtype)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, run_guarded(table.run, inputs, target))


@dtypes
@pytest.mark.parametrize("case", table.cases(), ids=str)
def test_two_kernels_stay_within_the_same_budget(case, dtype):
    """torch's product and its bias_gelu, each rounding once, as a layer without a GPU does."""
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, "torch"))


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
    "tanh instead of erf": dict(approximate="tanh"),
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
def test_y_is_that_of_the_stored_u(dtype, target, need):
    """To the bit: what the backward computes from u belongs to what the forward gave."""
    need("linear_gelu", target, dtype)
    case = Case(70, 96, 200)
    inputs = table.make_inputs(case, dtype)
    out = table.run(inputs, *target)
    # With weight the identity u is x itself, and its GELU has the same bits.
    again = dict(inputs, x=out["u"], weight=torch.eye(case.outputs, dtype=dtype))
    y, u = table.up(again, *target)
    assert torch.equal(u, out["u"]) and torch.equal(y, out["y"])


@dtypes
def test_same_bits_every_run_and_with_and_without_u(dtype, target, need):
    need("linear_gelu", target, dtype)
    inputs = table.make_inputs(Case(133, 72, 136), dtype)
    first, second = table.run(inputs, *target), table.run(inputs, *target)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    y, u = table.up(inputs, *target, save=False)
    assert u is None and torch.equal(y, first["y"])


def test_a_nan_or_inf_stays_in_its_row(target, need):
    need("linear_gelu", target, torch.float16)
    inputs = table.make_inputs(Case(45, 40, 136), torch.float16)
    clean = table.run(inputs, *target)
    spoilt = dict(inputs, x=inputs["x"].clone(), dy=inputs["dy"].clone())
    spoilt["x"][7, 3] = spoilt["dy"][44, 39] = torch.nan
    dirty = table.run(spoilt, *target)
    for name, row in (("y", 7), ("u", 7), ("dv", 44)):
        differs = (clean[name] != dirty[name]).any(1).nonzero().flatten().tolist()
        assert differs == [row] and dirty[name][row].isnan().all(), name
    assert dirty["dbias"].isnan().all()


def test_a_bias_that_is_not_finite_stays_in_its_column(target, need):
    """Rows of a tile beyond the last one must not add to the sums."""
    need("linear_gelu", target, torch.float16)
    inputs = table.make_inputs(Case(45, 40, 136), torch.float16)
    clean = table.run(inputs, *target)
    spoilt = dict(inputs, bias=inputs["bias"].clone())
    spoilt["bias"][3], spoilt["bias"][135] = torch.inf, -torch.inf
    dirty = table.run(spoilt, *target)
    for name in ("y", "dv"):
        differs = (clean[name] != dirty[name]).any(0).nonzero().flatten().tolist()
        assert differs == [3, 135], name
    # There GELU's slope is 1 and 0.
    dh = inputs["dy"].double() @ inputs["down"].double()
    assert (dirty["dbias"][3] - dh[:, 3].sum()).abs() <= 2**-10 * dh[:, 3].norm()
    assert dirty["dbias"][135] == 0


@dtypes
def test_the_gradient_of_bias_is_a_sum_of_unrounded_values(dtype, target, need):
    """Values of one size and both signs, of which each rounds to one: only their rests are left."""
    need("linear_gelu", target, dtype)
    inputs = table.make_inputs(Case(200, 8, 24), dtype)
    rest = torch.finfo(dtype).eps / 4
    inputs["u"].fill_(16.0)  # where GELU's slope is one
    inputs["down"].zero_()
    inputs["down"][0], inputs["down"][1] = 1.0, rest
    inputs["dy"].zero_()
    inputs["dy"][:, :2] = torch.tensor([[1.0, 1.0], [-1.0, 0.5]]).repeat(100, 1)
    dbias = table.run(inputs, *target)["dbias"].double().cpu()
    assert (dbias / (150 * rest) - 1).abs().max() <= 2 * UNIT_ROUNDOFF[dtype]


def test_other_dtypes_have_a_reason(target, need):
    need("linear_gelu", target)
    reason = dispatch.unsupported_reason("linear_gelu", *target, torch.float32)
    assert reason == "its tensor-core kernels take float16 and bfloat16, got torch.float32"


def test_a_call_of_one_kernel_compiles(target, need):
    """In one graph, for other numbers of rows too."""
    need("linear_gelu", target, torch.float16)
    backend, device = target
    weight = torch.randn(24, 16, dtype=torch.float16, device=device)

    def call(x):
        return linear_gelu(x, weight, fused=True, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 16, dtype=torch.float16, device=device)
        assert torch.equal(compiled(x), call(x))


@pytest.mark.parametrize("gap", [0, 8], ids=["not aligned", "rows apart"])
def test_u_may_lie_elsewhere_than_it_was_put(gap, target, need):
    """A hook on saved tensors gives back a tensor of its own."""
    need("linear_gelu", target, torch.float16)
    inputs = table.make_inputs(Case(37, 40, 72), torch.float16)
    moved = torch.empty(37 * (72 + gap) + 1, dtype=torch.float16)[1:].view(37, 72 + gap)[:, :72]
    moved.copy_(inputs["u"])
    first, second = (table.run(inputs | {"u": u}, *target) for u in (inputs["u"], moved))
    assert torch.equal(first["dv"], second["dv"]) and torch.equal(first["dbias"], second["dbias"])
