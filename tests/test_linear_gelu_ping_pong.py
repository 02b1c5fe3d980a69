"""linear_gelu's kernels for Hopper, by bulk copies and wgmma, in their build for the host.

What a CPU stands in for is compute capability 9.0, with one multiprocessor unless a test says
otherwise: so one block makes all tiles, and a product of one tile is enough for it.
"""

import re
from pathlib import Path

import pytest
import torch

from bertfast.commands import verify
from bertfast.ops.linear import cuda
from bertfast.testing import hold_to_budget
from bertfast.testing import linear_gelu as table
from bertfast.testing.linear_gelu import Case

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[1]
HALF, BF16 = torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])
# One tile; one for each consumer, and more of them by turns; fewer steps than there are stages, as
# many, and more; ragged at each end.
FORMS = [
    Case(1, 8, 8),
    Case(130, 136, 72, approximate="tanh"),
    Case(300, 320, 136, bias=False),
    Case(650, 64, 264),
    Case(17, 392, 72, layout="rows apart"),
]
forms = pytest.mark.parametrize("case", FORMS, ids=str)


@pytest.fixture(autouse=True)
def _hopper(host_runtime):
    host_runtime.set_gpu(90, 1)


def kernels(host_runtime):
    """The sources of the kernels that have accessed shared memory since the records were reset."""
    return {
        record[0].rpartition("/")[2].partition(":")[0] for record in host_runtime.bank_conflicts()
    }


@forms
def test_same_bits_in_every_scheduling_order(host_runtime, case):
    """Nor does it matter which block makes a tile."""
    results = []
    for order, seed, blocks in (("depth-first", 0, 1), ("reverse", 0, 2), ("random", 1, 3)):
        host_runtime.set_gpu(90, blocks)
        host_runtime.set_schedule(order, seed)
        results.append(table.run(table.make_inputs(case, HALF), "cuda"))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("number, case", list(enumerate([*FORMS, *table.cases()])), ids=str)
def test_budget_holds_when_sums_are_cut_off_and_approximations_off(host_runtime, number, case):
    host_runtime.set_perturb(True, 1)
    inputs = table.make_inputs(case, (HALF, BF16)[number % 2])
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@forms
def test_no_bank_conflicts(host_runtime, case):
    host_runtime.reset_records()
    table.run(table.make_inputs(case, HALF), "cuda")
    assert kernels(host_runtime) >= {"forward_ping_pong.cu", "backward_ping_pong.cu"}
    assert [record for record in host_runtime.bank_conflicts() if record[1] > 1] == []


@dtypes
def test_many_rows_of_one_size_keep_their_sum(dtype):
    """1,000 rows whose parts all have one sign: a sum in 16 bits would stop growing."""
    inputs = table.make_inputs(Case(1000, 16, 24), dtype)
    inputs["dy"], inputs["down"] = inputs["dy"].abs() + 1, inputs["down"].abs()
    inputs["u"] = inputs["u"].abs()
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


def test_every_tile_is_made_once():
    """Ones, so that sums are exact: eleven tiles of rows, in groups of eight and of three."""
    rows, cols = 1300, 264
    x, numbers = torch.ones(rows, 8, dtype=HALF), torch.arange(cols, dtype=HALF)
    weight = numbers[:, None].expand(cols, 8).contiguous() / 8
    y = torch.full((rows, cols), torch.nan, dtype=HALF)
    u = y.clone()
    cuda.forward(x, weight, None, False, y, u)
    assert torch.equal(u, numbers.expand(rows, cols))
    dv, dbias = y.clone(), y[0].clone()
    zero = torch.zeros_like(u)  # where the slope is one half
    cuda.backward(x, weight.t().contiguous() / 64, zero, zero[0], False, dv, dbias)
    expected = numbers.double() / 64 / 2
    assert (dv.double() - expected).abs().max() <= 2**-11 * 4
    assert (dbias.double() - rows * expected).abs().max() <= 2**-11 * 4 * rows


# Which kernel a call runs.


@pytest.mark.parametrize(
    "gpu, rows, taken",
    [((90, 1), 1, True), ((90, 2), 128, False), ((90, 2), 129, True), ((100, 1), 129, False)],
    ids=str,
)
def test_it_is_for_hopper_and_for_tiles_that_fill_it(host_runtime, gpu, rows, taken):
    host_runtime.set_gpu(*gpu)
    host_runtime.reset_records()
    table.run(table.make_inputs(Case(rows, 16, 24), HALF), "cuda")
    by = kernels(host_runtime)
    assert ("forward_ping_pong.cu" in by, "backward_ping_pong.cu" in by) == (taken, taken)
    assert ("by_warps.cu" in by) is not taken


def test_what_boxes_cannot_describe_is_made_by_warps(host_runtime):
    """One row in the place of all: rows that are no distance apart."""
    inputs = table.make_inputs(Case(200, 64, 72), HALF)
    for name in ("x", "dy"):
        inputs[name] = inputs[name][:1].expand(200, 64)
    y, u = (torch.empty(200, 72, dtype=HALF) for _ in range(2))
    host_runtime.reset_records()
    cuda.forward(inputs["x"], inputs["weight"], inputs["bias"], False, y, u)
    cuda.backward(inputs["dy"], inputs["down"], inputs["u"], inputs["bias"], False, y, None)
    assert "by_warps.cu" in kernels(host_runtime)
    assert not any("ping_pong" in name for name in kernels(host_runtime))


def test_verify_tries_both_kernels(host_runtime, monkeypatch):
    monkeypatch.setattr(table, "quick_cases", lambda: [Case(17, 16, 24)])
    monkeypatch.setattr(verify, "DTYPES", (HALF,))
    host_runtime.reset_records()
    rows = verify.check("linear_gelu", "cuda", "cpu")
    assert [row.ok for row in rows] == [True] * 4
    assert kernels(host_runtime) >= {"by_warps.cu", "forward_ping_pong.cu", "backward_ping_pong.cu"}
    host_runtime.reset_records()
    table.run(table.make_inputs(Case(17, 16, 24), HALF), "cuda")
    assert not any("ping_pong" in name for name in kernels(host_runtime))


# Planted faults: the kernels as they are, but for the calls of one line.

SOURCES = {
    "csrc/device/ping_pong.cuh": "forward",
    "csrc/kernels/linear_gelu/forward_ping_pong.cu": "forward",
    "csrc/kernels/linear_gelu/backward_ping_pong.cu": "backward",
}
ORDERS = r"\b(mbarrier_(init_fence|arrive\w*|wait)|named_barrier_\w+|wgmma_(fence|commit|wait<.>)"
ORDERS += r"|async_proxy_fence|tma_store_(commit|wait_read<0>)|__syncthreads)\("
FAULTS = [
    pytest.param(source, line, pass_, id=f"{Path(source).stem}-{line}-{found[1]}")
    for source, pass_ in SOURCES.items()
    for line, text in enumerate((ROOT / source).read_text().splitlines(), 1)
    if (found := re.search(ORDERS, text))
]


def run(pass_, inputs):
    """One of the two calls, with all that it may write."""
    rows, cols = inputs["u"].shape
    y, u = (torch.empty(rows, cols, dtype=HALF) for _ in range(2))
    if pass_ == "forward":
        cuda.forward(inputs["x"], inputs["weight"], inputs["bias"], False, y, u)
    else:
        cuda.backward(inputs["dy"], inputs["down"], inputs["u"], inputs["bias"], False, y, u[0])


def test_what_orders_the_kernels_is_found():
    assert len(FAULTS) >= 25


@pytest.mark.parametrize("source, line, pass_", FAULTS)
def test_nothing_that_orders_the_kernels_can_be_left_out(host_runtime, source, line, pass_):
    """Each wait, arrival, fence and barrier: without it some check fails. Two tiles of each
    consumer, and more steps than there are stages."""
    inputs = table.make_inputs(Case(390, 328, 72), HALF)
    host_runtime.set_schedule("random", 1)
    run(pass_, inputs)
    host_runtime.leave_out(source, line)
    with pytest.raises(RuntimeError, match=r"race on byte|deadlock|under way|ping_pong\.cuh?:\d+"):
        run(pass_, inputs)
