"""attention's backward for Hopper, by bulk copies and wgmma, in the build for the host.

It adds the same products in the same order as the kernels by mma.sync, so its gradients must be
theirs to the bit. Those hold to the error budget in test_attention_cuda.py.
"""

import functools
import random
import re
from pathlib import Path

import pytest
import torch
from test_attention_texts_apart import NAMES, hold_apart, make, spoil

from bertfast.ops import attention
from bertfast.testing import attention as table
from bertfast.testing import hold_to_budget
from bertfast.testing.attention import Case

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[1]
HALF, BF16 = torch.float16, torch.bfloat16

# Around one, two and three tiles; more blocks than stages; each layout, and tiles that are shared.
CASES = [
    (Case((129,), head_dim=64), HALF),
    (Case((330,), head_dim=32, p=0.2), BF16),
    (Case((24, 150), mask="left", p=0.2, head_dim=64), BF16),
    (Case((170, 40), mask="holes", values="spoilt", head_dim=64, p=0.1), HALF),
    (Case((150, 140), mask="all", head_dim=24), BF16),
    (Case((200,), head_dim=96, p=0.1), BF16),
    (Case((9, 30, 145), packed=True, plan=True, p=0.2, head_dim=120), HALF),
    (Case((64, 0, 192, 1, 193), packed=True, p=0.1, head_dim=64), BF16),
    (Case((17, 0, 40, 193, 3), packed=True, plan=True, p=0.1, head_dim=64), HALF),
    (Case((5, 20, 30, 128, 256), heads=2, packed=True, plan=True, head_dim=48), BF16),
    (Case((140,), head_dim=32, p=0.2, rotary=True), BF16),
    (Case((24, 150), mask="left", p=0.2, head_dim=64, rotary=True), BF16),
    (Case((150,), head_dim=96, rotary=True), HALF),
    (Case((150, 140), mask="holes", values="spoilt", head_dim=128, rotary=True), HALF),
    (Case((5, 20, 30, 128, 256), packed=True, plan=True, head_dim=64, rotary=True), HALF),
]
cases = pytest.mark.parametrize("case, dtype", CASES, ids=str)


@pytest.fixture(autouse=True)
def _on_hopper(host_runtime):
    host_runtime.set_gpu(90)


def kernels(host_runtime):
    """Those of the two whose accesses of shared memory were recorded."""
    places = " ".join(record[0] for record in host_runtime.bank_conflicts())
    return {name for name in ("backward_dq_bulk.cu", "backward_dkv_bulk.cu") if name in places}


def backward_of(inputs):
    """The backward of a call whose forward has run."""
    leaves = [inputs[name].detach().requires_grad_() for name in table.NAMES]
    out = attention(*leaves, **table.options(inputs), backend="cuda")
    return lambda: torch.autograd.grad(out, leaves, inputs["dout"], retain_graph=True)


@cases
def test_gradients_are_those_by_mma_sync_in_every_scheduling_order(host_runtime, case, dtype):
    host_runtime.set_gpu(100)
    run = backward_of(table.make_inputs(case, dtype))
    expected = run()
    host_runtime.set_gpu(90)
    host_runtime.reset_records()
    for order in ("depth-first", "reverse", "random"):
        host_runtime.set_schedule(order, 1)
        for number, (value, other) in enumerate(zip(run(), expected, strict=True)):
            assert torch.equal(value, other), (order, number)
    assert len(kernels(host_runtime)) == 2
    if case.head_dim != 96:  # whose rows of dout end in a part of a slab, once a tile
        assert [record for record in host_runtime.bank_conflicts() if record[1] > 1] == []


@pytest.mark.parametrize("case, dtype", [CASES[2], CASES[7]], ids=str)
def test_budget_holds_when_sums_are_cut_off_and_approximations_off(host_runtime, case, dtype):
    host_runtime.set_perturb(True, 1)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@pytest.mark.parametrize(
    "name, layout, p", [*zip(NAMES, ("planned", "packed") * 2, (0.2, 0.0) * 2, strict=True)]
)
def test_nothing_of_a_spoilt_text_gets_into_others(name, layout, p):
    """Bulk copies bring rows of the next text, and shared tiles are done again."""
    rng = random.Random(f"{name} {layout}")
    lengths, rows = [150, 9, 20, 7, 130], [1, 3]
    inputs = make(lengths, 32, HALF)
    hold_apart(inputs, spoil(inputs, name, rows, lengths, rng), rows, lengths, layout, "cuda", p)


def test_a_row_without_any_key_has_no_gradients():
    heads = torch.randn(4, 2, 140, 1, 32).half()
    heads[:, 0, 70] = torch.nan
    key_mask = torch.ones(2, 140, dtype=torch.bool)
    key_mask[0] = False
    leaves = [x.clone().requires_grad_() for x in heads[:3]]
    out = attention(*leaves, key_mask=key_mask, backend="cuda")
    for grad in torch.autograd.grad(out, leaves, heads[3]):
        assert (grad[0] == 0).all() and grad[1].isfinite().all() and grad[1].abs().max() > 0


def laid_out(length, **layout):
    """q, k and v whose memory tensor maps can't describe, or for which tiles do."""
    whole = torch.randn(3, 2, length, 2, 32).half()
    if layout.get("expanded"):
        return whole[:, :, :1].expand(whole.shape)
    if layout.get("between"):  # sequences begin half a row behind a row
        return (
            torch.randn(3, 2, length * 64 + 32)
            .half()[..., : length * 64]
            .unflatten(2, (length, 2, 32))
        )
    return whole


@pytest.mark.parametrize(
    "length, layout",
    [(128, {}), (130, {"between": True}), (130, {"expanded": True})],
    ids=str,
)
def test_calls_that_do_not_fit_keep_the_kernels_by_mma_sync(host_runtime, length, layout):
    leaves = [x.requires_grad_() for x in laid_out(length, **layout)]
    out = attention(*leaves, backend="cuda")
    torch.autograd.grad(out, leaves, out.detach())
    assert kernels(host_runtime) == set()


@pytest.mark.parametrize(
    "head_dim, more, bulk",
    [
        (64, {}, True),
        (48, {}, False),  # beside whose halves a kernel has zeros
        (30, {}, False),
        (64, {"window": (70, 40)}, False),
    ],
    ids=str,
)
def test_rotary_calls_take_them_where_heads_fill_their_columns(host_runtime, head_dim, more, bulk):
    run = backward_of(table.make_inputs(Case((130,), head_dim=head_dim, rotary=True, **more), HALF))
    host_runtime.reset_records()
    run()
    assert len(kernels(host_runtime)) == 2 * bulk


# Planted faults: the kernels as they are, but for the calls of one line.

SOURCES = [
    *(ROOT / "csrc/device/attention" / name for name in ("stream.cuh", "bulk_backward.cuh")),
    *(ROOT / "csrc/kernels/attention" / f"backward_{name}_bulk.cu" for name in ("dq", "dkv")),
]
ORDERS = re.compile(
    r"\b(mbarrier_(?:init_fence|arrive\w*|wait)|named_barrier_sync|wgmma_(?:fence|commit|wait<0>)"
    r"|async_proxy_fence|__syncthreads)\("
)
FAULTS = [
    pytest.param(path, line, id=f"{path.stem}-{line}-{found[1]}")
    for path in SOURCES
    for line, text in enumerate(path.read_text().splitlines(), 1)
    if (found := ORDERS.search(text.partition("//")[0]))
]


@functools.cache
def backward():
    """A call's backward, which can be run again: a sequence of more blocks than there are stages,
    the last one a part, and a tile that is shared, spoilt, and so done again."""
    inputs = table.make_inputs(Case((5, 20, 270), packed=True, plan=True, p=0.1, head_dim=32), HALF)
    inputs["k"][3] = torch.nan
    return backward_of(inputs)


def test_what_orders_the_kernels_is_found():
    assert len(FAULTS) >= 25
    backward()()


@pytest.mark.parametrize("path, line", FAULTS)
def test_nothing_that_orders_the_kernels_can_be_left_out(host_runtime, path, line):
    """Each wait, arrival, fence and barrier: without it some check fails."""
    run = backward()
    host_runtime.set_schedule("random", 1)
    host_runtime.leave_out(str(path.relative_to(ROOT)), line)
    found = r"race on byte|deadlock|under way|(stream|bulk_backward)\.cuh:\d+|_bulk\.cu:\d+"
    with pytest.raises(RuntimeError, match=found):
        run()
