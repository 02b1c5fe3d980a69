"""linear_gelu's CUDA C++ kernels: what only their build for the host shows.

The case table and the properties are in test_linear_gelu.py, for every backend.
"""

import pytest
import torch

from bertfast.ops.linear import cuda
from bertfast.testing import hold_to_budget
from bertfast.testing import linear_gelu as table
from bertfast.testing.linear_gelu import Case

pytestmark = pytest.mark.host

HALF, BF16 = torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])

# One stage of the main loop, as many as there are, more; whole tiles and ragged ones, in groups;
# in the forward small ones where there would be one large tile.
FORMS = [
    Case(1, 8, 8),
    Case(128, 96, 128, approximate="tanh"),
    Case(130, 136, 264),
    Case(300, 32, 24, bias=False),
    Case(17, 40, 72, layout="rows apart"),
]
forms = pytest.mark.parametrize("case", FORMS, ids=str)


@pytest.fixture(autouse=True)
def _needs_the_host_build(host_runtime):
    pass


# The host build's checks. Races, accesses outside shared memory, copies that nobody waits for and
# deadlocks raise by themselves in every test.


@forms
def test_same_bits_in_every_scheduling_order(host_runtime, case):
    results = []
    for order, seed in (("depth-first", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        host_runtime.set_schedule(order, seed)
        results.append(table.run(table.make_inputs(case, HALF), "cuda"))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@dtypes
@pytest.mark.parametrize("case", [*FORMS, *table.quick_cases()], ids=str)
def test_budget_holds_when_sums_are_cut_off_and_approximations_off(host_runtime, case, dtype):
    host_runtime.set_perturb(True, 1)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@forms
def test_no_bank_conflicts(host_runtime, case):
    host_runtime.reset_records()
    table.run(table.make_inputs(case, HALF), "cuda")
    records = host_runtime.bank_conflicts()
    # Two kinds of copies, three of operands, and each way out, there and back.
    assert sum("product.cuh" in record[0] for record in records) >= 5
    assert sum("by_warps.cu" in record[0] for record in records) >= 5
    assert [record for record in records if record[1] > 1] == []


# Tiles.


@pytest.mark.parametrize("rows", [129, 385, 513, 1025, 1300])
def test_every_tile_of_a_grouped_order_is_made_once(rows):
    """Ones, so that sums are exact: two to eleven tiles of rows, in groups of up to eight."""
    x = torch.ones(rows, 8, dtype=HALF)
    weight = torch.arange(136, dtype=HALF)[:, None].expand(136, 8).contiguous() / 8
    y = torch.full((rows, 136), torch.nan, dtype=HALF)
    u = y.clone()
    cuda.forward(x, weight, None, False, y, u)
    assert torch.equal(u, torch.arange(136, dtype=HALF).expand(rows, 136))
    dv, dbias = y.clone(), y[0].clone()
    zero = torch.zeros_like(u)  # where the slope is one half
    cuda.backward(x, weight.t().contiguous() / 64, zero, zero[0], False, dv, dbias)
    expected = torch.arange(136).double() / 64 / 2
    assert (dv.double() - expected).abs().max() <= 2**-11 * 2
    assert (dbias.double() - rows * expected).abs().max() <= 2**-11 * 2 * rows


def test_a_partial_sum_is_a_tile_of_rows(host_runtime):
    for rows, tiles in ((1, 1), (128, 1), (129, 2), (1300, 11)):
        assert host_runtime.linear_gelu_partial_shape(torch.empty(rows, 24)) == (tiles, 24)


@dtypes
def test_many_rows_of_one_size_keep_their_sum(dtype):
    """1,000 rows whose parts all have one sign: a sum in 16 bits would stop growing."""
    inputs = table.make_inputs(Case(1000, 16, 24), dtype)
    inputs["dy"], inputs["down"] = inputs["dy"].abs() + 1, inputs["down"].abs()
    inputs["u"] = inputs["u"].abs()
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@dtypes
@pytest.mark.parametrize("inputs", [8, 24, 32, 56, 64, 96, 104, 136])
def test_tails_of_the_inner_dimension_in_large_tiles(inputs, dtype):
    """The case table's are narrow, and one narrow tile is made as a small one."""
    values = table.make_inputs(Case(130, inputs, 24), dtype)
    hold_to_budget(table, values, table.run(values, "cuda"))


@dtypes
def test_small_tiles_give_the_bits_of_large_ones(dtype):
    """Fewer tiles than the host build's two multiprocessors are made as small ones."""
    inputs = table.make_inputs(Case(200, 200, 136), dtype)
    whole = table.run(inputs, "cuda")
    part = dict(inputs)
    for name, count in (("x", 100), ("weight", 120), ("bias", 120)):
        part[name] = inputs[name][:count].clone()
    y, u = table.up(part, "cuda")
    assert torch.equal(y, whole["y"][:100, :120]) and torch.equal(u, whole["u"][:100, :120])


@dtypes
def test_rows_are_the_same_wherever_they_lie_in_a_tile(dtype):
    inputs = table.make_inputs(Case(200, 72, 136), dtype)
    whole = table.run(inputs, "cuda")
    part = dict(inputs)
    for name in ("x", "dy", "u"):
        part[name] = inputs[name][69:197].clone()
    for name, value in table.run(part, "cuda").items():
        if name != "dbias":
            assert torch.equal(value, whole[name][69:197]), name


def test_gaps_between_rows_are_not_multiplied():
    """They hold NaN in the case table; here infinities, which a zero would make NaN too."""
    inputs = table.make_inputs(Case(40, 24, 72), HALF)
    dense = table.run(inputs, "cuda")
    for name in ("x", "weight", "dy", "down"):
        rows, width = inputs[name].shape
        wide = torch.full((rows, width + 40), torch.inf, dtype=HALF)
        wide[:, :width] = inputs[name]
        inputs[name] = wide[:, :width]
    for name, value in table.run(inputs, "cuda").items():
        assert torch.equal(value, dense[name]), name


@pytest.mark.parametrize("name", ["x", "weight", "dy", "down"])
def test_offsets_beyond_32_bits(name):
    gap = 2**29  # the fifth row starts at element 2^31; what lies between is never touched
    try:
        far = torch.empty(7 * gap + 8, dtype=HALF).as_strided((8, 8), (gap, 1))
    except RuntimeError:
        pytest.skip("8 GiB of addresses are too many here")
    inputs = table.make_inputs(Case(8, 8, 8), HALF)
    near = table.run(inputs, "cuda")
    far.copy_(inputs[name])
    for result, value in table.run(inputs | {name: far}, "cuda").items():
        assert torch.equal(value, near[result]), result


# Planted faults: the budget, and the checks above, see what they are for.


@pytest.mark.parametrize("fault", ["a stage is left out", "rows of another tile", "no bias"])
def test_planted_faults_exceed_the_budget(fault):
    inputs = table.make_inputs(Case(130, 136, 264), HALF)
    good = table.run(inputs, "cuda")
    hold_to_budget(table, inputs, good)
    spoilt = dict(inputs)
    if fault == "a stage is left out":  # the last one has 8 of 136
        for name, end in (("x", (slice(None), slice(128, None))), ("down", slice(128, None))):
            spoilt[name] = inputs[name].clone()
            spoilt[name][end] = 0
    elif fault == "rows of another tile":
        spoilt["x"], spoilt["dy"] = inputs["x"].clone(), inputs["dy"].clone()
        spoilt["x"][128:], spoilt["dy"][128:] = inputs["x"][:2], inputs["dy"][:2]
    else:
        spoilt["bias"] = torch.zeros_like(inputs["bias"])
    bad = table.run(spoilt, "cuda")
    for name in ("y", "dv", "dbias"):
        with pytest.raises(AssertionError, match=f"{name}: max error"):
            hold_to_budget(table, inputs, good | {name: bad[name]})


# Refusals.


def test_reasons():
    assert cuda.unsupported_reason("cpu") is None
    assert cuda.unsupported_reason("cpu", BF16, 64, 8, 2**30, "backward") is None
    for case, text in (
        ((torch.float32,), "take float16 and bfloat16, got torch.float32"),
        ((HALF, 12), "inputs must be a multiple of 8 between 8 and 16777216, got 12"),
        ((HALF, 8, 12), "outputs must be a multiple of 8"),
        ((HALF, 8, 8, 2**30 + 1), "at most 1073741824 rows, got 1073741825"),
    ):
        assert text in str(cuda.unsupported_reason("cpu", *case))


@pytest.mark.parametrize("rows", [2**26 - 1, 2**30])
def test_grids_of_the_most_rows_can_be_launched(host_runtime, rows):
    """A launch looks at its grid also where nothing is run."""
    host_runtime.set_dry_launch(True)
    weight = torch.zeros(8, 8, dtype=HALF)
    try:
        y = torch.empty(rows, 8, dtype=HALF)  # nobody touches it
    except RuntimeError:
        pytest.skip("16 GiB of addresses are too many here")
    before = host_runtime.launch_count()
    cuda.forward(y, weight, None, False, y, None)
    cuda.backward(y, weight, y, None, False, y, None)
    assert host_runtime.launch_count() == before + 2
