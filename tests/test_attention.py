"""attention on every backend: the case table against float64, and properties."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.guard import run_guarded

from bertfast import packing
from bertfast.commands.bench.lengths import MIXES
from bertfast.ops import attention, attention_qkv, dispatch, dropout_keep_mask
from bertfast.testing import attention as table
from bertfast.testing import compare, hold_to_budget, worst
from bertfast.testing.attention import Case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


@dtypes
@pytest.mark.parametrize("case", table.cases(), ids=str)
def test_kernels_stay_within_the_error_budget(case, dtype, target, need):
    need("attention", target, dtype)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, run_guarded(table.run, inputs, target))


@dtypes
@pytest.mark.parametrize("case", table.quick_cases(), ids=str)
def test_torch_backend_stays_within_the_error_budget(case, dtype):
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, "torch"))


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        Case((40, 66), heads=2, mask="right", p=0.2),
        Case((17, 0, 30, 70), heads=2, packed=True, plan=True),
        Case((130,), head_dim=64, layout="apart"),
    ],
    ids=str,
)
def test_one_buffer_gives_the_same_bits(case, dtype, target, need):
    need("attention_qkv", target, dtype)
    inputs = table.make_inputs(case, dtype)
    apart, together = table.run(inputs, *target), run_guarded(table.run_qkv, inputs, target)
    for name, value in apart.items():
        assert torch.equal(value, together[name]), name


@pytest.mark.parametrize("fault", ["bf16 sums", "p in 8 bits"])
def test_budget_catches_a_planted_precision_fault(fault):
    inputs = table.make_inputs(Case((140,), head_dim=64), torch.float16)
    good = table.rounding_model(inputs)
    if fault == "bf16 sums":
        bad = table.rounding_model(inputs, statistics=lambda t: t.bfloat16().float())
    else:
        bad = table.rounding_model(inputs, operand=lambda t: t.bfloat16().float())
    oracle, scales = table.oracle(inputs), table.scales(inputs)
    assert worst(compare(good, oracle, good, scales)).ok
    assert not worst(compare(bad, oracle, good, scales)).ok


def online_softmax(inputs, fault):
    """The forward in float32, 64 keys at a time, with fused multiply-adds as a GPU has them (here
    in float64, rounded once). fault: what was summed before is rescaled by 2^(m c - round(m c))
    where m did not grow, and only the sum of probabilities is."""
    q, k, v = (inputs[name].float().transpose(1, 2) for name in table.NAMES)
    c = torch.tensor(math.log2(math.e) / math.sqrt(q.shape[-1]), dtype=torch.float32)
    products = q @ k.transpose(-1, -2)

    def fma(a, b):
        return (a.double() * c.double() + b.double()).float()

    m = torch.full((*products.shape[:-1], 1), -torch.inf)
    used, total, sums = m, torch.zeros_like(m), torch.zeros_like(q)
    for start in range(0, products.shape[-1], 64):
        block = products[..., start : start + 64]
        high = torch.maximum(m, block.amax(-1, keepdim=True))
        shift = high * c
        alpha = torch.exp2(fma(m, -shift) if fault else used - shift)
        weights = torch.exp2(fma(block, -shift))
        total = total * alpha + weights.sum(-1, keepdim=True)
        sums = torch.where(high > m, sums * alpha, sums) + weights @ v[..., start : start + 64, :]
        m, used = high, shift
    return {"out": (sums / total).transpose(1, 2).to(inputs["q"].dtype)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_budget_catches_what_a_large_maximum_rounds_to(dtype):
    """It was there once, in a kernel whose cases had no large scores."""
    caught = []
    for case in (c for c in table.cases() if c.top and not c.packed and c.mask == "none"):
        inputs = table.make_inputs(case, dtype)
        oracle, model = table.oracle(inputs), table.rounding_model(inputs)
        scales = table.scales(inputs)
        parts = [{"out": found["out"]} for found in (oracle, model, scales)]
        assert worst(compare(online_softmax(inputs, False), *parts)).ok, str(case)
        caught.append(not worst(compare(online_softmax(inputs, True), *parts)).ok)
    assert any(caught)


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an architecture of its own")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        Case((100,), p=0.1),
        Case((40, 100), mask="left", p=0.1),
        Case((17, 40, 130, 9, 50, 3), packed=True, plan=True, p=0.1),
        Case((130,), head_dim=128, p=0.1),
        Case((60, 150), packed=True, head_dim=64, p=0.1),
        Case((150,), p=0.1),
    ],
    ids=str,
)
def test_configurations_of_gpus_without_wgmma(case, dtype, need, monkeypatch):
    """The interpreter runs Hopper's; these are those of Ampere, Ada and consumer Blackwell."""
    need("attention", ("triton", "cpu"))
    module = dispatch.backend_module("attention", "triton")
    monkeypatch.setattr(module.triton_lib, "capability", lambda tensor: 80)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, "triton"))


# Properties.


@dtypes
@pytest.mark.parametrize("length", [1, 65, 130])
def test_probabilities_sum_to_one(dtype, length, target, need):
    need("attention", target, dtype)
    backend, device = target
    q, k = torch.randn(2, 1, length, 2, 32, device=device).to(dtype)
    out = attention(q, k, torch.ones_like(q), backend=backend)
    # One rounding of the output. float32's is as fine as those inside two sums of `length` terms,
    # which add up like a random walk.
    allowed = torch.finfo(dtype).eps
    if dtype == torch.float32:
        allowed = (1 + 2 * length**0.5) * 2**-24
    assert (out.float() - 1).abs().max() <= allowed


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("mask", ["right", "left"])
@pytest.mark.parametrize("plan", [False, True])
def test_packed_is_padded(p, mask, plan, target, need):
    need("attention", target, torch.float32)  # in 16 bits: test_attention_cuda.py
    backend, device = target
    case = Case((20, 40, 33, 5), heads=2, mask=mask, p=p)  # float32's blocks are of 32
    inputs = table.make_inputs(case, torch.float32)
    own = inputs["key_mask"]
    inputs["dout"] = inputs["dout"] * own[:, :, None, None]
    padded = table.run(inputs, *target)
    packed = {name: inputs[name][own] for name in (*table.NAMES, "dout")}
    cu = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
    packed = table.run(
        inputs | packed | {"key_mask": None, "cu_seqlens": cu, "max_seqlen": 40, "plan": plan},
        *target,
    )
    for name, value in padded.items():
        assert (value[own] - packed[name]).abs().max() < 4e-6, name


@pytest.mark.parametrize("length", [70, 140])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_draws_the_exported_mask(p, length, target, need):
    """With v the identity out is the probabilities themselves, dropped where the mask says so."""
    need("attention", target, torch.float32)  # in 16 bits: test_attention_cuda.py
    backend, device = target
    q, k = torch.randn(2, 2, length, 1, 16, device=device)
    seed = torch.tensor([-77], device=device)
    keep = dropout_keep_mask(seed, 9, (2, 1, length, length), p, "attention")
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 4
    expected = scores.softmax(-1) * keep / (1 - round(65536 * p) / 65536)
    for first in range(0, length, 70):
        v = torch.eye(length, device=device)[:, None, first : first + 70]
        v = v.expand(2, -1, -1, -1).contiguous()
        width = v.shape[-1]
        padded_q, padded_k = (F.pad(t, (0, width - 16)) for t in (q, k))
        out = attention(
            *(padded_q, padded_k, v),
            **dict(dropout_p=p, seed=seed, site=9, scale=0.25, backend=backend),
        )
        difference = out.transpose(1, 2) - expected[..., first : first + 70]
        assert difference.abs().max() < 1e-6
        dropped = ~keep[..., first : first + 70]
        assert (out.transpose(1, 2)[dropped] == 0).all()
    assert abs(keep.float().mean() - (1 - p)) < 4 * (p * (1 - p) / keep.numel()) ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("length", [50, 150])
def test_rows_without_keys_give_zeros(p, length, target, need):
    need("attention", target)
    case = Case((length, length - 3), mask="all", p=p)
    inputs = table.make_inputs(case, torch.float16)
    result = table.run(inputs, *target)
    for name, value in result.items():
        assert (value[0] == 0).all(), name
        assert value.isfinite().all(), name


@pytest.mark.parametrize("mask", ["right", "left", "holes"])
@pytest.mark.parametrize("length", [60, 150])
def test_what_is_masked_does_not_get_out(mask, length, target, need):
    need("attention", target)
    clean = Case((length, length // 2), mask=mask)
    inputs = table.make_inputs(clean, torch.float16)
    spoilt = table.make_inputs(replace(clean, values="spoilt"), torch.float16)
    spoilt["q"] = inputs["q"]
    one, other = table.run(inputs, *target), table.run(spoilt, *target)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    for name in ("dk", "dv"):
        assert (other[name][~inputs["key_mask"]] == 0).all()


@dtypes
@pytest.mark.parametrize(
    "case",
    [Case((140,), p=0.1), Case((5, 70, 30), packed=True, plan=True, p=0.1)],
    ids=str,
)
def test_same_bits_every_run_and_with_and_without_gradients(case, dtype, target, need):
    need("attention", target, dtype)
    inputs = table.make_inputs(case, dtype)
    first, second = table.run(inputs, *target), table.run(inputs, *target)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    backend, device = target
    tensors = [inputs[name].to(device) for name in table.NAMES]
    out = attention(*tensors, **table.options(inputs, device), backend=backend)
    assert torch.equal(out, first["out"])


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("q", "v")], ids="+".join)
def test_any_subset_of_gradients(wanted, target, need, finest):
    need("attention", target)
    backend, device = target
    inputs = table.make_inputs(Case((40,)), finest("attention", target))
    everything = table.run(inputs, *target)
    leaves = {name: inputs[name].to(device).clone() for name in table.NAMES}
    for name in wanted:
        leaves[name].requires_grad_()
    out = attention(**leaves, backend=backend)
    grads = torch.autograd.grad(out, [leaves[n] for n in wanted], inputs["dout"].to(device))
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, everything[f"d{name}"]), name


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_to_do(packed, target, need, finest):
    need("attention", target)
    backend, device = target
    shape = (0, 2, 16) if packed else (2, 0, 2, 16)
    like = dict(device=device, dtype=finest("attention", target), requires_grad=True)
    leaves = [torch.zeros(shape, **like) for _ in "qkv"]
    more = {}
    if packed:
        cu = torch.zeros(3, dtype=torch.int32, device=device)
        more = {"cu_seqlens": cu, "max_seqlen": 0, "plan": packing.plan(cu, 0)}
    for name in (backend, "torch"):
        out = attention(*leaves, **more, backend=name)
        assert out.shape == shape
        for grad in torch.autograd.grad(out.sum(), leaves):
            assert grad.shape == shape


def test_reference_gradients_in_float64():
    inputs = table.make_inputs(Case((3, 5), mask="left", p=0.3, head_dim=4), torch.float32)
    leaves = [inputs[name].double().requires_grad_() for name in table.NAMES]
    options = table.options(inputs)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, **options), leaves)


def test_torch_backend_is_sdpa():
    q, k, v = torch.randn(3, 2, 33, 2, 16)
    ours = attention(q, k, v)
    stock = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    assert torch.equal(ours, stock.transpose(1, 2))


@pytest.mark.parametrize("backend", ["torch", "target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_of_torch(dtype, backend, target, need):
    need("attention", target)
    name, device = target
    name = "torch" if backend == "torch" else name
    leaves = [torch.randn(1, 9, 2, 16, device=device).to(dtype).requires_grad_() for _ in "qkv"]
    buffer = torch.stack(leaves, -3)  # which autocast doesn't do for float16 on a CPU
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = attention(*leaves, backend=name)
        stock = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves))
        stock = stock.transpose(1, 2)
        together = attention_qkv(buffer, backend=name)
    assert ours.dtype == stock.dtype == together.dtype
    assert (ours.float() - stock.float()).abs().max() < 2**-6
    for mine, leaf in zip(torch.autograd.grad(ours.float().sum(), leaves), leaves, strict=True):
        assert mine.dtype == leaf.dtype


# The plan.


@pytest.mark.parametrize(
    "lengths",
    [(5, 0, 30, 20, 9, 0, 40), (0, 130, 64, 65, 1, 0), (64,) * 3, (20,) * 9, (0, 0), (200,), ()],
)
@pytest.mark.parametrize("known", [False, True])
def test_plan_covers_each_token_once(lengths, known):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = sum(lengths)
    plan = packing.plan(cu, max(lengths, default=0), total if known else None)
    mean = total // max(len(lengths), 1) if known else max(lengths, default=0)
    assert plan.tile == (32 if mean <= 32 else 64)
    covered = torch.zeros(total, dtype=torch.int64)
    bounds = cu.tolist()
    for sequence, first, many in plan.tiles[: int(plan.count)].tolist():
        start, end = bounds[sequence], bounds[sequence + many]
        assert many == 1 or end - start <= plan.tile
        covered[start + first : min(start + first + plan.tile, end)] += 1
    assert (covered == 1).all()
    assert (plan.tiles[int(plan.count) :] == 0).all()


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [64] * 3,
        [3] * 40,
        [0, 5, 0, 0, 70, 1, 0],
        [32, 33, 31, 1],
        [200, 7, 130, 2, 2],
        [0],
        [],
    ],
    ids=str,
)
def test_the_host_lays_out_what_the_device_plans(lengths):
    cu, laid_out = packing.lay_out(lengths)
    assert cu.dtype == torch.int32 and cu.tolist() == [sum(lengths[:n]) for n in range(len(cu))]
    plan = packing.plan(cu, max(lengths, default=0), sum(lengths))
    count = int(plan.count)
    assert laid_out.tiles.tolist() == plan.tiles[:count].tolist()
    for name in ("count", "tile", "sequences", "max_seqlen"):
        assert getattr(laid_out, name) == getattr(plan, name), name
    assert laid_out.tiles.data_ptr() % 16 == cu.data_ptr() % 16
    if plan.runs is not None:
        assert laid_out.runs == plan.runs


def test_most_scores_are_useful():
    """The purpose of two tile sizes and of sharing tiles, on three mixes of lengths."""
    for name, least in (("squad", 0.75), ("wikipedia", 0.90), ("queries", 0.40)):
        shares = []
        for seed in range(10):
            cu = torch.tensor([0, *MIXES[name].lengths(64, seed)]).cumsum(0).to(torch.int32)
            plan = packing.plan(cu, MIXES[name].longest, int(cu[-1]))
            shares.append(packing.useful_share(cu, plan))
        assert sum(shares) / 10 >= least, (name, shares)


def test_useful_share_is_counted():
    cu = torch.tensor([0, 64, 74, 84], dtype=torch.int32)
    plan = packing.plan(cu, 64)
    # A tile of 64 by 64, and one of 64 by 32 that 10 and 10 share.
    assert packing.useful_share(cu, plan) == (64**2 + 2 * 10**2) / (64 * 64 + 64 * 32)


def test_case_names_are_unique():
    for cases in (table.cases(), table.quick_cases()):
        assert len({str(case) for case in cases}) == len(cases)
    assert len(table.cases()) <= 120
    assert "attention" in dispatch.ops()
