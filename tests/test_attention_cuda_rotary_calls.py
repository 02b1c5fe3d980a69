"""Rotary positions in attention's CUDA C++ kernels, in their build for the host: whole calls.

The table of cases by position is in test_attention_positions.py, for every backend.
"""

import re

import pytest
import torch
from support.guard import run_guarded
from test_attention_backward_bulk import backward_of
from test_attention_texts_apart import NAMES
from test_bindings import off

from bertfast import packing
from bertfast.ops import attention
from bertfast.ops.attention import cuda
from bertfast.ops.attention.scores import Scores
from bertfast.packing.sequences import Sequences
from bertfast.testing import attention as table
from bertfast.testing import compare, hold_to_budget, positions, worst
from bertfast.testing.attention import Case

pytestmark = pytest.mark.host

HALF, BF16 = torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])


# Forward and backward. Heads whose halves' columns are in the same thread, those that are not, and
# those that have to be copied into whole vectors.

FORMS = [Case((70,), head_dim=d, p=0.1, rotary=True) for d in (32, 64, 96, 128, 2, 24, 72, 80, 126)]
FORMS += [
    Case((24, 100), mask="left", p=0.2, rotary=True),
    Case((70, 40), mask="holes", values="spoilt", head_dim=64, rotary=True),
    Case((70, 40), mask="all", head_dim=40, rotary=True),
    Case((17, 0, 40, 70, 3), packed=True, p=0.1, head_dim=64, rotary=True),
    Case((17, 0, 40, 70, 3), packed=True, plan=True, p=0.1, head_dim=96, rotary=True),
    Case((5, 20, 30), heads=2, packed=True, plan=True, head_dim=64, rotary=True),
    Case((9, 30, 2, 0, 15, 1), packed=True, plan=True, p=0.1, head_dim=50, rotary=True),
]
# On Hopper, long sequences, of which the forward is by bulk copies, and of heads of 32, 64, 96 and
# 128 the backward.
LONG = [
    Case((193,), head_dim=32, p=0.1, rotary=True),
    Case((150, 200), mask="left", p=0.2, head_dim=64, rotary=True),
    Case((150,), head_dim=96, rotary=True),
    Case((150, 140), mask="holes", values="spoilt", head_dim=128, rotary=True),
    Case((17, 0, 130, 40, 3, 256), packed=True, plan=True, p=0.1, head_dim=64, rotary=True),
    Case((140, 20), packed=True, head_dim=80, rotary=True),
]
# In the forward in tiles of 128 queries, where multiprocessors are few. So is dq of heads of 32 and
# 64, and of heads of 32 dkv in tiles of 128 keys.
DOUBLE = [
    Case((200,), head_dim=64, p=0.1, rotary=True),
    Case((90, 140), mask="left", head_dim=32, p=0.2, rotary=True),
    Case((17, 30, 0, 200, 140, 3), packed=True, plan=True, head_dim=64, rotary=True),
    Case((170,), head_dim=48, rotary=True),
    Case((170,), head_dim=30, p=0.1, rotary=True),
]
GPUS = {"tiles": (100, 1000), "bulk": (90, 1000), "double": (80, 1)}
forms = pytest.mark.parametrize(
    "gpu, case",
    [("tiles", case) for case in FORMS]
    + [("bulk", case) for case in LONG]
    + [("double", case) for case in DOUBLE],
    indirect=["gpu"],
    ids=str,
)


@pytest.fixture
def gpu(request, host_runtime):
    host_runtime.set_gpu(*GPUS[request.param])
    return request.param


def kernels(host_runtime):
    """The files whose accesses of shared memory were recorded."""
    return {re.sub(r"(.*/)?(\w+)\.cuh?:.*", r"\2", r[0]) for r in host_runtime.bank_conflicts()}


@forms
def test_same_bits_in_every_scheduling_order(host_runtime, gpu, case):
    inputs, results = table.make_inputs(case, HALF), []
    for order, seed in (("depth-first", 0), ("reverse", 0), ("random", 1)):
        host_runtime.set_schedule(order, seed)
        results.append(table.run(inputs, "cuda"))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@dtypes
@forms
def test_budget_holds_when_sums_are_cut_off_and_approximations_off(host_runtime, gpu, case, dtype):
    host_runtime.set_perturb(True, 1)
    inputs = table.make_inputs(case, dtype)
    result = run_guarded(table.run, inputs, ("cuda", "cpu"))
    hold_to_budget(table, inputs, result)
    for name, value in table.run_qkv(inputs, "cuda").items():
        assert torch.equal(value, result[name]), name


@pytest.mark.parametrize("case", DOUBLE, ids=str)
def test_tiles_of_128_give_the_bits_of_64(host_runtime, case):
    inputs, found, accesses = table.make_inputs(case, BF16), [], []
    for multiprocessors in (1000, 1):
        host_runtime.set_gpu(80, multiprocessors)
        run = backward_of(inputs)
        host_runtime.reset_records()
        found.append(run())
        accesses.append(sum(count for _, _, count in host_runtime.bank_conflicts()))
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        assert torch.equal(one, other), number
    # They read shared memory less.
    assert (accesses[1] < 0.9 * accesses[0]) == (case.head_dim in (32, 64)), accesses


@forms
def test_no_bank_conflicts(host_runtime, gpu, case):
    host_runtime.reset_records()
    table.run(table.make_inputs(case, HALF), "cuda")
    records = host_runtime.bank_conflicts()
    # The backward's rows of dout that end in a part of a slab are read with some, once a tile.
    excused = "backward_dq_bulk.cu" if 64 < case.head_dim <= 96 else "none"
    assert [record for record in records if record[1] > 1 and excused not in record[0]] == []
    found, bulk = kernels(host_runtime), gpu == "bulk" and case.head_dim != 80
    whole = case.head_dim in (64, 128) or bulk or (gpu == "double" and case.head_dim == 32)
    assert ("rotary" in found) == (not whole)
    assert ("dq_tile" in found, "backward_dq_bulk" in found) == (not bulk, bulk)
    assert ("dkv_double_tile" in found) == (gpu == "double" and case.head_dim == 32)
    assert ("forward_bulk" in found) == (gpu == "bulk")


# Planted faults, each of which is not even near the budget.


def backwards_again(heads, scores):
    """The gradients, rotated further instead of back."""
    return heads, scores._replace(sin=-scores.sin)


def not_back(heads, scores):
    return heads, Scores(scores.scale)


FAULTS = {
    "backwards again": backwards_again,
    "not back": not_back,
    "the row's positions": "the row's positions",
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(
    "gpu, head_dim, longest",
    [("tiles", 64, 40), ("tiles", 48, 40), ("bulk", 64, 150), ("double", 32, 150)],
    indirect=["gpu"],
)
def test_budget_catches_a_wrong_rotation(monkeypatch, gpu, head_dim, longest, fault):
    case = Case((17, longest, 9), packed=True, plan=True, head_dim=head_dim, rotary=True)
    inputs = table.make_inputs(case, HALF)
    inputs["rotary"] = positions.tables(sum(case.lengths), head_dim)
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))
    rotate = cuda._rotated

    def wrong(module, heads, sequences, scores):
        if callable(fault):
            return fault(*rotate(module, heads, sequences, scores))
        bounds = torch.tensor([0, sum(case.lengths)], dtype=torch.int32)
        return rotate(module, heads, Sequences(None, bounds, sum(case.lengths)), scores)

    monkeypatch.setattr(cuda, "_rotated", wrong)
    oracle, model, scales = (f(inputs) for f in (table.oracle, table.rounding_model, table.scales))
    assert not worst(compare(table.run(inputs, "cuda"), oracle, model, scales)).ok


# What comes with positions.


@pytest.mark.parametrize(
    "gpu, head_dim, longest",
    [("tiles", 64, 70), ("tiles", 24, 70), ("bulk", 64, 150), ("double", 32, 150)],
    indirect=["gpu"],
)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_spoilt_text_gets_into_others(host_runtime, gpu, head_dim, longest, name):
    lengths = [20, 9, 30, 5, longest]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    options = dict(cu_seqlens=cu, max_seqlen=longest, plan=packing.plan(cu, longest, sum(lengths)))
    options["rotary"] = positions.tables(longest, head_dim)
    inputs = dict(zip(NAMES, torch.randn(4, sum(lengths), 1, head_dim).half(), strict=True))

    def run(given):
        leaves = [given[key].clone().requires_grad_() for key in NAMES[:3]]
        out = attention(*leaves, **options, backend="cuda")
        return [out.detach(), *torch.autograd.grad(out, leaves, given["dout"])]

    clean, spoilt = run(inputs), dict(inputs) | {name: inputs[name].clone()}
    spoilt[name][25, 0, 3] = torch.nan
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[20:29] = False
    for before, after in zip(clean, run(spoilt), strict=True):
        assert torch.equal(before[others], after[others])
        assert before.isfinite().all()
    assert ("backward_dq_bulk" in kernels(host_runtime)) == (gpu == "bulk")


def test_tables_that_begin_anywhere():
    """In memory they may begin between two places of 16 bytes; kernels read a copy."""
    case = Case((20,), head_dim=16, rotary=True)
    inputs = table.make_inputs(case, HALF)
    right = table.run(inputs, "cuda")
    inputs["rotary"] = tuple(map(off, inputs["rotary"]))
    assert inputs["rotary"][0].data_ptr() % 16
    for name, value in table.run(inputs, "cuda").items():
        assert torch.equal(value, right[name]), name
