"""attention's window and bias by distance in CUDA C++, in the build for the host: what only their
kernels have. The table of cases is in test_attention_positions.py, for every backend.
"""

import itertools

import pytest
import torch

from bertfast.ops import attention
from bertfast.testing import attention as table
from bertfast.testing import hold_to_budget
from bertfast.testing.attention import Case

pytestmark = pytest.mark.host

HALF, BF16 = torch.float16, torch.bfloat16
# Windows that begin inside a tile, in front of it and behind it, and leave blocks out; each layout;
# tiles that are shared; both of the widths that there are kernels for.
CASES = [
    Case((200,), head_dim=64, window=(20, 9), p=0.1),
    Case((40, 170), head_dim=24, mask="left", window=(70, 0), p=0.2),
    Case((150, 90), head_dim=96, mask="holes", values="spoilt", window=(0, 40), reach=5),
    Case((90, 140), heads=2, head_dim=64, reach=30, p=0.1),
    Case((17, 0, 140, 9), heads=2, head_dim=128, packed=True, reach=70, p=0.1),
    Case((17, 0, 40, 200, 3), head_dim=64, packed=True, plan=True, window=(9, 30), p=0.1),
    Case((5, 20, 9, 30), heads=2, packed=True, plan=True, window=(4, 6), reach=8),
]
forms = pytest.mark.parametrize(
    "capability, case",
    [(80, case) for case in CASES] + [(90, case) for case in CASES if case.head_dim == 64],
    ids=str,
)


@pytest.fixture(autouse=True)
def _needs_the_host_build(host_runtime):
    pass


@forms
def test_same_bits_in_every_scheduling_order(host_runtime, capability, case):
    host_runtime.set_gpu(capability, 1)
    inputs = table.make_inputs(case, HALF)
    expected = None
    for order, seed in (("depth-first", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        host_runtime.set_schedule(order, seed)
        found = table.run(inputs, "cuda")
        expected = expected or found
        for name, value in found.items():
            assert torch.equal(value, expected[name]), (order, name)


@forms
def test_budget_holds_when_sums_are_cut_off_and_approximations_off(host_runtime, capability, case):
    host_runtime.set_gpu(capability)
    host_runtime.set_perturb(True, 1)
    inputs = table.make_inputs(case, BF16)
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@forms
def test_no_bank_conflicts(host_runtime, capability, case):
    host_runtime.set_gpu(capability)
    host_runtime.reset_records()
    table.run(table.make_inputs(case, HALF), "cuda")
    records = host_runtime.bank_conflicts()
    assert any("by_position.cuh" in record[0] for record in records) == (case.reach is not None)
    assert [record for record in records if record[1] > 1] == []


def accesses(host_runtime) -> int:
    return sum(count for _, _, count in host_runtime.bank_conflicts())


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_outside_a_window_are_left_out(host_runtime, head_dim, p):
    """Of both passes: their work grows as a band of scores does, and without a window as all of
    them. Of tiles of 64 the band of two has 4 blocks and that of eight 22."""

    def passes(length: int, window: tuple[int, int]) -> tuple[int, int]:
        leaves = [torch.randn(1, length, 1, head_dim).half().requires_grad_() for _ in range(3)]
        host_runtime.reset_records()
        out = attention(*leaves, window=window, dropout_p=p, backend="cuda")
        forward = accesses(host_runtime)
        out.backward(out.detach())
        return forward, accesses(host_runtime) - forward

    sizes = itertools.product((128, 512), ((5, 5), (500, 500)))
    work = {size: passes(*size) for size in sizes}
    for i in range(2):
        assert work[512, (5, 5)][i] < 5.5 * work[128, (5, 5)][i]
        assert work[512, (5, 5)][i] < 0.6 * work[512, (500, 500)][i]


@pytest.mark.parametrize("head_dim", [32, 128])
def test_what_is_outside_a_window_reaches_no_gradient(head_dim):
    """A NaN of keys far behind, or of queries: where their blocks aren't visited, though those that
    are visited have one."""
    q, k, v, dout = torch.randn(4, 1, 300, 1, head_dim).half()

    def run(q, k, v, dout):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, window=(20, 20), backend="cuda")
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    want = run(q, k, v, dout)
    for spoilt in range(4):
        tensors = [x.clone() for x in (q, k, v, dout)]
        tensors[spoilt][:, 200:] = torch.nan
        for one, other in zip(run(*tensors), want, strict=True):
            assert torch.equal(one[:, :64], other[:, :64])


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("reach", [None, 3])
def test_a_query_that_sees_no_key(p, reach):
    """Zeros, and so are its gradients; keys that nobody sees have none either."""
    case = Case((150, 150), mask="holes", window=(0, 0), reach=reach, p=p)
    inputs = table.make_inputs(case, HALF)
    found = table.run(inputs, "cuda")
    hidden = ~inputs["key_mask"]
    assert hidden.sum() > 50
    for name in ("out", "dq", "dk", "dv"):
        assert not found[name][hidden].any()
        assert found[name].isfinite().all()
    hold_to_budget(table, inputs, found)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_of_either_sign_with_a_bias(scale):
    inputs = table.make_inputs(Case((70,), reach=20, scale=scale, p=0.1), HALF)
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, HALF, BF16], ids=str)
def test_a_bias_may_have_another_dtype(dtype):
    """It is read as it is: of the same numbers, in whatever dtype, the results are the same."""
    inputs = table.make_inputs(Case((70, 40), heads=2, packed=True, reach=20, p=0.1), BF16)
    expected = table.run(inputs, "cuda")
    inputs["distance_bias"] = inputs["distance_bias"].float().to(dtype)
    found = table.run(inputs, "cuda")
    assert found["dbias"].dtype == dtype
    gradient, other = found.pop("dbias").float(), expected["dbias"].float()
    assert (gradient - other).abs().max() <= 2**-7 * other.abs().max()  # rounded twice
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_rows_behind_a_sequence_have_no_infinite_weights():
    """exp of a bias is one, as they have no scores; times their zeros it would be NaN."""
    leaves = [x.requires_grad_() for x in torch.randn(3, 70, 1, 32).half()]
    bias = torch.full((1, 1), 1e4, requires_grad=True)
    bounds = torch.tensor([0, 9, 70], dtype=torch.int32)
    options = dict(cu_seqlens=bounds, max_seqlen=61, backend="cuda")
    out = attention(*leaves, **options, distance_bias=bias)
    for grad in torch.autograd.grad(out, [*leaves, bias], torch.randn(70, 1, 32).half()):
        assert grad.isfinite().all()


@pytest.mark.parametrize("length, reach", [(9, 200), (300, 0), (64, 64), (129, 128)])
def test_a_bias_that_reaches_further_or_less_far(length, reach):
    inputs = table.make_inputs(Case((length,), heads=2, reach=reach), HALF)
    found = table.run(inputs, "cuda")
    hold_to_budget(table, inputs, found)
    if reach >= length:  # distances that no score has
        assert not found["dbias"][:, : reach - length + 1].any()


def test_heads_that_do_not_lie_in_vectors():
    inputs = table.make_inputs(
        Case((40, 70), head_dim=20, mask="right", reach=9, window=(9, 9)), HALF
    )
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


def test_a_gradient_that_nobody_wants_is_not_computed(host_runtime):
    inputs = table.make_inputs(Case((70,), reach=9), HALF)
    leaves = [inputs[name].requires_grad_() for name in table.NAMES]
    host_runtime.reset_records()
    out = attention(*leaves, distance_bias=inputs["distance_bias"], backend="cuda")
    torch.autograd.grad(out, leaves, inputs["dout"])
    places = " ".join(record[0] for record in host_runtime.bank_conflicts())
    assert "backward_bias.cu" not in places and "dkv_tile.cuh" in places
