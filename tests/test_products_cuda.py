"""linear_gelu's and linear_gated's CUDA C++ kernels: what only their build for the host shows.

The case tables and the properties are in test_linear_gelu.py and test_linear_gated.py, for every
backend.
"""

import mmap
from types import ModuleType

import pytest
import torch

from bertfast.ops import dispatch
from bertfast.testing import hold_to_budget, linear_gated, linear_gelu

pytestmark = pytest.mark.host

HALF, BF16 = torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])

TABLES = {"linear_gelu": linear_gelu, "linear_gated": linear_gated}
HALVES = {linear_gelu: 1, linear_gated: 2}  # of the forward's weight, u and its gradient
GRADIENT = {linear_gelu: "dv", linear_gated: "du"}
tables = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)

# One stage of the main loop, as many as there are, more; whole tiles and ragged ones, in groups;
# in the forward small ones where there would be one large tile.
FORMS = {
    linear_gelu: [
        linear_gelu.Case(1, 8, 8),
        linear_gelu.Case(128, 96, 128, approximate="tanh"),
        linear_gelu.Case(130, 136, 264),
        linear_gelu.Case(300, 32, 24, bias=False),
        linear_gelu.Case(17, 40, 72, layout="rows apart"),
    ],
    linear_gated: [
        linear_gated.Case(1, 8, 8, activation="gelu_tanh"),
        linear_gated.Case(128, 96, 64, activation="silu"),
        linear_gated.Case(130, 136, 136),
        linear_gated.Case(300, 32, 24, bias=False, activation="gelu_tanh"),
        linear_gated.Case(17, 40, 72, activation="silu", layout="rows apart"),
        linear_gated.Case(33, 40, 32),
    ],
}
forms = pytest.mark.parametrize(
    ("table", "case"),
    [
        pytest.param(table, case, id=f"{name}-{case}")
        for name, table in TABLES.items()
        for case in FORMS[table]
    ],
)


def kernels(table: ModuleType) -> ModuleType:
    """The op's CUDA backend."""
    return dispatch.backend_module(table.__name__.rpartition(".")[2], "cuda")


def default(table: ModuleType) -> bool | str:
    """The exact GELU, as the backend's calls have it."""
    return "gelu" if HALVES[table] == 2 else False


def part_of_columns(matrix: torch.Tensor, columns: int, count: int, dim: int = 0) -> torch.Tensor:
    """The first `columns` of each of `count` halves."""
    halves = matrix.unflatten(dim, (count, -1)).narrow(dim + 1, 0, columns)
    return halves.flatten(dim, dim + 1).contiguous()


@pytest.fixture(autouse=True)
def _needs_the_host_build(host_runtime):
    pass


# The host build's checks. Races, accesses outside shared memory, copies that nobody waits for and
# deadlocks raise by themselves in every test.


@forms
def test_same_bits_in_every_scheduling_order(host_runtime, table, case):
    results = []
    for order, seed in (("depth-first", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        host_runtime.set_schedule(order, seed)
        results.append(table.run(table.make_inputs(case, HALF), "cuda"))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@dtypes
@tables
def test_budget_holds_when_sums_are_cut_off_and_approximations_off(host_runtime, table, dtype):
    host_runtime.set_perturb(True, 1)
    for case in (*FORMS[table], *table.quick_cases()):
        inputs = table.make_inputs(case, dtype)
        try:
            hold_to_budget(table, inputs, table.run(inputs, "cuda"))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@forms
def test_no_bank_conflicts(host_runtime, table, case):
    host_runtime.reset_records()
    table.run(table.make_inputs(case, HALF), "cuda")
    records = host_runtime.bank_conflicts()
    # Two kinds of copies, three of operands; and each way out, there and back.
    assert sum("product.cuh" in record[0] for record in records) >= 5
    assert sum("product_out.cuh" in record[0] for record in records) >= 4
    assert [record for record in records if record[1] > 1] == []


# Tiles.


@tables
@pytest.mark.parametrize("rows", [129, 385, 513, 1025, 1300])
def test_every_tile_of_a_grouped_order_is_made_once(rows, table):
    """Ones, so that sums are exact: two to eleven tiles of rows, in groups of up to eight."""
    halves, cuda = HALVES[table], kernels(table)
    wide = 136 * halves
    x = torch.ones(rows, 8, dtype=HALF)
    weight = torch.arange(wide, dtype=HALF)[:, None].expand(wide, 8).contiguous() / 8
    y = torch.full((rows, 136), torch.nan, dtype=HALF)
    u = torch.full((rows, wide), torch.nan, dtype=HALF)
    cuda.forward(x, weight, None, default(table), y, u)
    assert torch.equal(u, torch.arange(wide, dtype=HALF).expand(rows, wide))
    assert not y.isnan().any()
    du, dbias = u.clone(), u[0].clone()
    # Where the slope is one half, or, of what is gated, times the other half.
    zero = torch.zeros_like(u)
    zero[:, 136:] = 1.0
    down = weight[:136].t().contiguous() / 64
    cuda.backward(x, down, zero, torch.zeros_like(u[0]), default(table), du, dbias)
    expected = torch.zeros(wide, dtype=torch.float64)
    expected[:136] = torch.arange(136) / 64 / 2
    assert (du.double() - expected).abs().max() <= 2**-11 * 2
    assert (dbias.double() - rows * expected).abs().max() <= 2**-11 * 2 * rows


@pytest.mark.parametrize("op", TABLES)
def test_a_partial_sum_is_a_tile_of_rows(host_runtime, op):
    shape = getattr(host_runtime, f"{op}_partial_shape")
    for rows, tiles in ((1, 1), (128, 1), (129, 2), (1300, 11)):
        assert shape(torch.empty(rows, 24)) == (tiles, 24)


@dtypes
@tables
def test_many_rows_of_one_size_keep_their_sum(dtype, table):
    """1,000 rows whose parts all have one sign: a sum in 16 bits would stop growing."""
    inputs = table.make_inputs(table.Case(1000, 16, 24), dtype)
    inputs["dy"], inputs["down"] = inputs["dy"].abs() + 1, inputs["down"].abs()
    inputs["u"] = inputs["u"].abs()
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@dtypes
@tables
@pytest.mark.parametrize("inputs", [8, 24, 32, 56, 64, 96, 104, 136])
def test_tails_of_the_inner_dimension_in_large_tiles(inputs, dtype, table):
    """The case table's are narrow, and one narrow tile is made as a small one."""
    values = table.make_inputs(table.Case(130, inputs, 24), dtype)
    hold_to_budget(table, values, table.run(values, "cuda"))


@dtypes
@tables
def test_small_tiles_give_the_bits_of_large_ones(dtype, table):
    """Fewer tiles than the host build's two multiprocessors are made as small ones."""
    halves = HALVES[table]
    inputs = table.make_inputs(table.Case(200, 200, 136), dtype)
    whole = table.run(inputs, "cuda")
    few = 120 // halves // 8 * 8
    part = inputs | {"x": inputs["x"][:100].clone()}
    part |= {name: part_of_columns(inputs[name], few, halves) for name in ("weight", "bias")}
    y, u = table.up(part, "cuda")
    assert torch.equal(y, whole["y"][:100, :few])
    assert torch.equal(u, part_of_columns(whole["u"][:100], few, halves, 1))


@dtypes
@tables
def test_rows_are_the_same_wherever_they_lie_in_a_tile(dtype, table):
    inputs = table.make_inputs(table.Case(200, 72, 136), dtype)
    whole = table.run(inputs, "cuda")
    part = dict(inputs)
    for name in ("x", "dy", "u"):
        part[name] = inputs[name][69:197].clone()
    for name, value in table.run(part, "cuda").items():
        if name != "dbias":
            assert torch.equal(value, whole[name][69:197]), name


@tables
def test_gaps_between_rows_are_not_multiplied(table):
    """They hold NaN in the case table; here infinities, which a zero would make NaN too."""
    inputs = table.make_inputs(table.Case(40, 24, 72), HALF)
    dense = table.run(inputs, "cuda")
    for name in ("x", "weight", "dy", "down"):
        rows, width = inputs[name].shape
        wide = torch.full((rows, width + 40), torch.inf, dtype=HALF)
        wide[:, :width] = inputs[name]
        inputs[name] = wide[:, :width]
    for name, value in table.run(inputs, "cuda").items():
        assert torch.equal(value, dense[name]), name


@tables
@pytest.mark.parametrize("name", ["x", "weight", "dy", "down"])
def test_offsets_beyond_32_bits(name, table):
    gap = 2**29  # the fifth row starts at element 2^31; what lies between is never touched
    inputs = table.make_inputs(table.Case(8, 8, 8), HALF)
    rows = inputs[name].shape[0]
    try:
        far = torch.empty((rows - 1) * gap + 8, dtype=HALF).as_strided((rows, 8), (gap, 1))
    except RuntimeError:
        pytest.skip("8 or 16 GiB of addresses are too many here")
    near = table.run(inputs, "cuda")
    far.copy_(inputs[name])
    for result, value in table.run(inputs | {name: far}, "cuda").items():
        assert torch.equal(value, near[result]), result


# Planted faults: the budget, and the checks above, see what they are for.


def spoil(fault: str, table: ModuleType, inputs: dict) -> dict:
    spoilt = dict(inputs)
    if fault == "a stage is left out":  # the last one has 8 of 136
        for name, end in (("x", (slice(None), slice(128, None))), ("down", slice(128, None))):
            spoilt[name] = inputs[name].clone()
            spoilt[name][end] = 0
    elif fault == "rows of another tile":
        spoilt["x"], spoilt["dy"] = inputs["x"].clone(), inputs["dy"].clone()
        spoilt["x"][128:], spoilt["dy"][128:] = inputs["x"][:2], inputs["dy"][:2]
    elif fault == "no bias":
        spoilt["bias"] = torch.zeros_like(inputs["bias"])
    elif fault == "halves change places":
        for name, dim in (("weight", 0), ("bias", 0), ("u", 1)):
            spoilt[name] = torch.cat(inputs[name].chunk(2, dim)[::-1], dim)
    return spoilt


FAULTS = ["a stage is left out", "rows of another tile", "no bias"]


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        pytest.param(table, fault, id=f"{name}-{fault}")
        for name, table in TABLES.items()
        for fault in (*FAULTS, *["halves change places"] * (HALVES[table] == 2))
    ],
)
def test_planted_faults_exceed_the_budget(table, fault):
    inputs = table.make_inputs(table.Case(130, 136, 264), HALF)
    good = table.run(inputs, "cuda")
    hold_to_budget(table, inputs, good)
    bad = table.run(spoil(fault, table, inputs), "cuda")
    for name in ("y", GRADIENT[table], "dbias"):
        with pytest.raises(AssertionError, match=f"{name}: max error"):
            hold_to_budget(table, inputs, good | {name: bad[name]})


# Refusals.


@tables
def test_reasons(table):
    cuda, most = kernels(table), 2**24 // HALVES[table]
    assert cuda.unsupported_reason("cpu") is None
    assert cuda.unsupported_reason("cpu", BF16, 64, most, 2**30, "backward") is None
    for case, text in (
        ((torch.float32,), "take float16 and bfloat16, got torch.float32"),
        ((HALF, 12), "inputs must be a multiple of 8 between 8 and 16777216, got 12"),
        ((HALF, 8, 12), "outputs must be a multiple of 8"),
        ((HALF, 8, most + 8), str(most)),
        ((HALF, 8, 8, 2**30 + 1), "at most 1073741824 rows, got 1073741825"),
    ):
        assert text in str(cuda.unsupported_reason("cpu", *case))


@tables
@pytest.mark.parametrize("rows", [2**26 - 1, 2**30])
def test_grids_of_the_most_rows_can_be_launched(host_runtime, rows, table):
    """A launch looks at its grid also where nothing is run."""
    host_runtime.set_dry_launch(True)
    halves, cuda = HALVES[table], kernels(table)
    weight = torch.zeros(8 * halves, 8, dtype=HALF)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, rows * 8 * halves * 2, flags=flags)  # nobody touches it
    except OSError as error:
        pytest.skip(reason=f"this machine doesn't reserve the memory: {error}")
    u = torch.frombuffer(memory, dtype=HALF).view(rows, -1)
    y = u.view(halves, rows, 8)[0]
    before = host_runtime.launch_count()
    cuda.forward(y, weight, None, default(table), y, None)
    cuda.backward(y, weight[:8], u, None, default(table), u, None)
    assert host_runtime.launch_count() == before + 2
