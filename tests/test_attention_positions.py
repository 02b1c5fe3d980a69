"""Rotary positions, windows and biases by distance in attention, on every backend."""

import re

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from support.guard import run_guarded
from torch.utils._python_dispatch import TorchDispatchMode

from bertfast.ops import attention, attention_qkv, bucket_bias, dispatch
from bertfast.ops.attention import limits, run
from bertfast.ops.attention.scores import Scores
from bertfast.ops.dropout import NO_DROPOUT
from bertfast.packing.sequences import Sequences
from bertfast.testing import attention as table
from bertfast.testing import compare, hold_to_budget, positions, worst
from bertfast.testing.attention import Case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
ALL = dict(rotary=True, window=(30, 9), reach=20)


@dtypes
@pytest.mark.parametrize("case", table.cases_by_position(), ids=str)
def test_torch_backend_stays_within_the_error_budget(case, dtype):
    inputs = table.make_inputs(case, dtype)
    result = table.run(inputs, "torch")
    hold_to_budget(table, inputs, result)
    for name, value in table.run_qkv(inputs, "torch").items():
        assert value.dtype == result[name].dtype and value.shape == result[name].shape
        assert (value - result[name]).abs().max() <= 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("change", ["rotary", "window", "distance_bias"])
def test_budget_catches_a_wrong_position(change):
    inputs = table.make_inputs(Case((140,), head_dim=64, **ALL), torch.float16)
    wrong = dict(inputs)
    if change == "window":
        wrong["window"] = (31, 9)
    elif change == "rotary":
        wrong["rotary"] = tuple(table.bfloat16().float() for table in inputs["rotary"])
    else:
        wrong["distance_bias"] = inputs["distance_bias"].roll(1, 1)
    oracle, model, scales = (f(inputs) for f in (table.oracle, table.rounding_model, table.scales))
    assert worst(compare(model, oracle, model, scales)).ok
    assert not worst(compare(table.rounding_model(wrong), oracle, model, scales)).ok


def test_rotary_is_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, v = torch.randn(3, 2, 33, 2, 16, dtype=torch.float64)
    cos, sin = positions.tables(40, 16)
    twice = (torch.cat((t[:33], t[:33]), -1).double()[None] for t in (cos, sin))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    rotated = apply_rotary_pos_emb(*heads_first[:2], *twice)
    want = F.scaled_dot_product_attention(*rotated, heads_first[2]).transpose(1, 2)
    assert (attention(q, k, v, rotary=(cos, sin)) - want).abs().max() < 1e-12


def test_gradients_of_the_reference_in_float64():
    case = Case((3, 7), mask="left", p=0.3, head_dim=4, rotary=True, window=(2, 1), reach=1)
    inputs = table.make_inputs(case, torch.float32)
    leaves = [inputs[name].double().requires_grad_() for name in (*table.NAMES, "distance_bias")]
    options = table.options(inputs)

    def call(*leaves):
        return attention(*leaves[:3], distance_bias=leaves[3], **options)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("form", [{}, dict(rotary=True), dict(reach=20), ALL], ids=str)
def test_scores_keep_float32_under_autocast(form, p):
    """Rounded to 16 bits, a score of 30 would be off by a tenth, and so would its weight."""
    inputs = table.make_inputs(Case((70,), head_dim=64, p=p, scale=1.0, **form), torch.bfloat16)
    if inputs["distance_bias"] is not None:  # a parameter in float32
        inputs["distance_bias"] = 30 * torch.randn(inputs["distance_bias"].shape)
    wide = [inputs[name].float() for name in table.NAMES]
    options = table.options(inputs) | {"distance_bias": inputs["distance_bias"]}
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*wide, **options, backend="torch")
    tables = (f(inputs) for f in (table.oracle, table.rounding_model, table.scales))
    oracle, model, scales = ({"out": found["out"]} for found in tables)
    assert worst(compare({"out": out}, oracle, model, scales)).ok


def test_a_bias_by_buckets_is_a_gather_with_an_ordered_gradient():
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    buckets = torch.tensor([4, 4, 0, 1, 2, 3, 4])
    bias = bucket_bias(weight, buckets)
    assert torch.equal(bias, weight[buckets].t())
    upstream = torch.randn(3, 7, dtype=torch.float64)
    got, want = (torch.autograd.grad(b, weight, upstream) for b in (bias, weight[buckets].t()))
    assert torch.allclose(got[0], want[0], rtol=1e-14)


class _Largest(TorchDispatchMode):
    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.values = max(self.values, result.numel())
        return result


def test_a_window_makes_no_matrix_of_all_scores():
    q = torch.randn(1, 4096, 1, 8)
    with _Largest() as seen:
        out = attention(q, q, q, window=(64, 64))
    assert out.shape == q.shape
    assert 0 < seen.values <= 512 * 512  # of 256 queries by 384 keys, and of 4096 tokens by 8


def test_a_window_of_whole_sequences_is_none():
    """Whatever backend serves a call without a window serves it."""
    q = torch.randn(2, 33, 1, 16)
    assert torch.equal(attention(q, q, q, window=(32, 40)), attention(q, q, q))


def test_a_window_to_one_side_is_a_causal_mask():
    q, k, v = torch.randn(3, 2, 37, 2, 16, dtype=torch.float64)
    out = attention(q, k, v, window=(2**30, 0))
    heads = (t.transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads, is_causal=True)
    torch.testing.assert_close(out.transpose(1, 2), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_nothing_to_do(bias):
    q = torch.zeros(0, 2, 16, requires_grad=True)
    cu = torch.zeros(3, dtype=torch.int32)
    more = dict(distance_bias=torch.ones(2, 5, requires_grad=True)) if bias else {}
    options = dict(rotary=positions.tables(3, 16), window=(1, 1))
    out = attention(q, q, q, cu_seqlens=cu, max_seqlen=3, **options, **more)
    assert out.shape == q.shape
    leaves = (q, *more.values())
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and not grad.any()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.bfloat16) for case in table.cases_by_position()),
        *((case, torch.float32) for case in table.cases_by_position()[1::4]),
        *((case, torch.float16) for case in table.cases_by_position()[::6]),
    ],
    ids=str,
)
def test_kernels_stay_within_the_error_budget(case, dtype, target, need):
    need_features(case, target, dtype, need)
    inputs = table.make_inputs(case, dtype)
    result = run_guarded(table.run, inputs, target)
    hold_to_budget(table, inputs, result)
    if dtype == torch.float16:
        for name, value in table.run_qkv(inputs, *target).items():
            assert torch.equal(value, result[name]), name


def need_features(case, target, dtype, need):
    need("attention", target, dtype)
    case = (torch.device(target[1]), dtype, case.head_dim, None, case.features)
    if reason := dispatch.unsupported_reason("attention", target[0], *case):
        pytest.skip(reason)


@pytest.mark.parametrize("length", [60, 150])
def test_a_bias_may_need_no_gradient(length, target, need):
    """Short sequences' backward is then one kernel."""
    case = Case((length, 20), heads=2, mask="right", reach=30, p=0.1)
    need_features(case, target, torch.float16, need)
    inputs = table.make_inputs(case, torch.float16)
    want = table.run(inputs, *target)
    leaves = [inputs[name].to(target[1]).requires_grad_() for name in table.NAMES]
    bias = inputs["distance_bias"].to(target[1])
    options = table.options(inputs, target[1])
    out = attention(*leaves, **options, distance_bias=bias, backend=target[0])
    grads = torch.autograd.grad(out, leaves, inputs["dout"].to(target[1]))
    for name, value in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        # Delta is summed in another order, so ds may be rounded to the other side.
        assert (value - want[name]).abs().max() <= 2**-9 * want[name].abs().max(), name
    only = bias.clone().requires_grad_()
    tensors = [leaf.detach() for leaf in leaves]
    out = attention(*tensors, **options, distance_bias=only, backend=target[0])
    (grad,) = torch.autograd.grad(out, only, inputs["dout"].to(target[1]))
    assert torch.equal(grad, want["dbias"])


def test_what_is_outside_the_window_is_not_read(target, need):
    """A NaN there would get out, as it is a key and value like any other."""
    case = Case((200,), window=(20, 20))
    need_features(case, target, torch.float16, need)
    q, k, v = torch.randn(3, 1, 200, 1, 32, device=target[1]).half()
    want = attention(q, k, v, window=(20, 20), backend=target[0])
    spoilt = v.clone()
    spoilt[:, 128:] = torch.nan
    out = attention(q, k, spoilt, window=(20, 20), backend=target[0])
    assert torch.equal(out[:, :44], want[:, :44])


def test_tables_may_lie_anyhow(target, need):
    """Here as columns of wider ones, as a model's own are, for a layer's node too."""
    case = Case((20,), rotary=True, reach=2)
    need_features(case, target, torch.float16, need)
    inputs = table.make_inputs(case, torch.float16)
    heads = run.Heads(*(inputs[name].to(target[1]) for name in table.NAMES))
    cos, sin = (each.to(target[1]) for each in inputs["rotary"])
    bias = inputs["distance_bias"].to(target[1])
    found = []
    for tables in (
        (cos, sin, bias),
        (torch.cat((t, t), -1)[:, : t.shape[1]] for t in (cos, sin, bias)),
        (torch._neg_view(-t) for t in (cos, sin, bias)),
    ):
        call = (Sequences(), Scores(0.25, *tables), NO_DROPOUT, target[0])
        saved = run.forward(heads, *call, True)
        grads, dbias = run.backward(saved.out, heads, saved, *call, True)
        found.append((saved.out, *grads, dbias))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("which", ["cos", "sin", "bias"])
def test_lazily_negated_tables(which, target, need):
    """Whose memory holds -x, as the imaginary part of what was conjugated; in the backward too."""
    case = Case((20,), rotary=True, reach=2)
    need_features(case, target, torch.float16, need)
    inputs = table.make_inputs(case, torch.float16)
    tables = dict(zip(("cos", "sin"), inputs["rotary"], strict=True))
    tables["bias"] = inputs["distance_bias"]
    tables[which] = torch._neg_view(-tables[which])
    other = inputs | {"rotary": (tables["cos"], tables["sin"]), "distance_bias": tables["bias"]}
    for run_one in (table.run, table.run_qkv):
        want = run_one(inputs, *target)
        for name, value in run_one(other, *target).items():
            assert torch.equal(value, want[name]), name


def test_registered_ops(target, need, finest):
    dtype = finest("attention", target)
    case = Case((9, 20), mask="left", heads=2, rotary=True, reach=3, window=(5, 9))
    need_features(case, target, dtype, need)
    backend, device = target
    inputs = table.make_inputs(case, dtype)
    parts = [inputs[name].to(device) for name in table.NAMES]
    mask, bias = (inputs[name].to(device) for name in ("key_mask", "distance_bias"))
    tables = [each.to(device) for each in inputs["rotary"]]
    rest = [mask, None, None, 0, None, 0, 0.25, 0, 3, backend, *tables, bias, 5, 9]
    dout, ops = inputs["dout"].to(device), torch.ops.bertfast
    for suffix, tensors in (("", parts), ("_qkv", [torch.stack(parts, -3)])):
        out, lse = getattr(ops, f"attention{suffix}_forward")(*tensors, *rest)
        backward = getattr(ops, f"attention{suffix}_backward").default
        forward = getattr(ops, f"attention{suffix}").default
        for op, arguments in (
            (forward, (*tensors, *rest)),
            (backward, (dout, *tensors, out, lse, *rest, True)),
        ):
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        # Gradients that autograd batches go through the op one after the other.
        leaves = [tensor.clone().requires_grad_() for tensor in (*tensors, bias)]
        call = attention_qkv if suffix else attention
        options = dict(key_mask=mask, rotary=tables, window=(5, 9), scale=0.25, backend=backend)
        out = call(*leaves[:-1], **options, distance_bias=leaves[-1])
        batch = torch.stack((dout, 2 * dout))
        once = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        both = torch.autograd.grad(out, leaves, batch, is_grads_batched=True)
        for one, two in zip(once, both, strict=True):
            assert torch.equal(one, two[0])


def test_compiled_whole(target, need, finest):
    dtype = finest("attention", target)
    case = Case((20, 20), heads=2, rotary=True, reach=3, window=(5, 9))
    need_features(case, target, dtype, need)
    inputs = table.make_inputs(case, dtype)
    tables = tuple(each.to(target[1]) for each in inputs["rotary"])

    def step(f):
        names = (*table.NAMES, "distance_bias")
        leaves = [inputs[name].to(target[1]).clone().requires_grad_() for name in names]
        out = f(*leaves)
        return out, *torch.autograd.grad(out, leaves, inputs["dout"].to(target[1]))

    def call(q, k, v, bias):
        options = dict(rotary=tables, window=(5, 9), backend=target[0])
        return attention(q, k, v, **options, distance_bias=bias)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(step(compiled), step(call), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.host
def test_what_a_backend_does_not_have_is_refused_in_words(monkeypatch, need):
    need("attention", ("cuda", "cpu"))
    monkeypatch.setitem(limits.FEATURES, "cuda", ("window",))
    q = torch.randn(1, 9, 1, 16, dtype=torch.float16)
    tables = positions.tables(9, 16)
    text = "backend 'cuda' can't run attention here: its kernels don't have rotary yet"
    with pytest.raises(ValueError, match=re.escape(text)):
        attention(q, q, q, window=(1, 1), rotary=tables, backend="cuda")
