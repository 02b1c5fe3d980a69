"""Every bad input of attention, attention_qkv and their plans has an error that names it."""

import re

import pytest
import torch

from bertfast import packing
from bertfast.ops import attention, attention_qkv
from bertfast.ops.attention import limits, registered

Q = torch.randn(2, 5, 2, 16)
NESTED = torch.nested.nested_tensor([Q[0, :2], Q[0]])
PACKED = torch.randn(10, 2, 16)
CU = torch.tensor([0, 4, 10], dtype=torch.int32)
TABLE = torch.ones(6, 8)
PACKED_CALL = dict(q=PACKED, k=PACKED, v=PACKED, cu_seqlens=CU, max_seqlen=6)
BAD = [
    (dict(q=[1]), TypeError, "q must be a tensor, got list"),
    (dict(q=Q[0, 0]), ValueError, "[tokens, heads, head_dim], got [2, 16]"),
    (dict(k=Q[:, :4]), ValueError, "k must have shape [2, 5, 2, 16], got [2, 4, 2, 16]"),
    (
        dict(v=Q.half()),
        TypeError,
        "v must have dtype torch.float32 (q's), got torch.float16",
    ),
    (dict(k=Q.to("meta")), ValueError, "k must be on cpu (where q is), got meta"),
    (dict(key_mask=[True]), TypeError, "key_mask must be a bool tensor, got list"),
    (
        dict(key_mask=torch.ones(2, 5)),
        TypeError,
        "key_mask must have dtype torch.bool (True = attend), got torch.float32",
    ),
    (
        dict(key_mask=torch.ones(2, 4, dtype=torch.bool)),
        ValueError,
        "key_mask must have shape [2, 5], got [2, 4]",
    ),
    (dict(cu_seqlens=CU), ValueError, "cu_seqlens must be None where q is padded"),
    (dict(max_seqlen=5), ValueError, "max_seqlen must be None where q is padded"),
    (dict(scale="1"), TypeError, "scale must be a number, got str"),
    (dict(dropout_p=2.0), ValueError, "dropout_p must be between 0 and 1, got 2.0"),
    (dict(backend="cudnn"), ValueError, "backend must be one of 'auto', 'torch'"),
    (PACKED_CALL | dict(cu_seqlens=None), TypeError, "cu_seqlens must be an int32 tensor"),
    (
        PACKED_CALL | dict(cu_seqlens=CU.long()),
        TypeError,
        "cu_seqlens must have dtype torch.int32, got torch.int64",
    ),
    (PACKED_CALL | dict(max_seqlen=None), TypeError, "max_seqlen must be an int, got NoneType"),
    (
        PACKED_CALL | dict(max_seqlen=5),
        ValueError,
        "max_seqlen must be at least the longest sequence, 6, got 5",
    ),
    (
        PACKED_CALL | dict(cu_seqlens=CU - 1),
        ValueError,
        "cu_seqlens must begin with 0, got -1",
    ),
    (
        PACKED_CALL | dict(key_mask=torch.ones(2, 5, dtype=torch.bool)),
        ValueError,
        "key_mask must be None where q is packed, got a tensor",
    ),
    (
        PACKED_CALL | dict(plan=packing.plan(CU[:2], 6)),
        ValueError,
        "plan must be made from cu_seqlens: it has 1 sequences, cu_seqlens 2",
    ),
    (
        PACKED_CALL | dict(plan=packing.plan(CU, 8)),
        ValueError,
        "plan must be made with max_seqlen 6, got one of 8",
    ),
    # what a score is made of
    (dict(rotary=TABLE), TypeError, "rotary must be (cos, sin), two tensors, got Tensor"),
    (dict(rotary=(TABLE,)), TypeError, "rotary must be (cos, sin), two tensors, got tuple"),
    (dict(rotary=(TABLE, None)), TypeError, "rotary's sin must be a tensor, got NoneType"),
    (
        dict(rotary=(TABLE, TABLE.half())),
        TypeError,
        "rotary's sin must have dtype torch.float32, got torch.float16",
    ),
    (
        dict(rotary=(TABLE[:, :7], TABLE)),
        ValueError,
        "rotary's cos must have shape [positions, 8] (half the head dimension), the same for both, "
        "got [6, 7]",
    ),
    (dict(rotary=(TABLE, TABLE[:5])), ValueError, "the same for both, got [5, 8]"),
    (
        dict(rotary=(TABLE[:4], TABLE[:4])),
        ValueError,
        "rotary's cos must have 5 positions or more, got 4",
    ),
    (
        PACKED_CALL | dict(rotary=(TABLE[:5], TABLE[:5])),
        ValueError,
        "rotary's cos must have 6 positions or more, got 5",
    ),
    (
        dict(rotary=(TABLE, TABLE.to("meta"))),
        ValueError,
        "rotary's sin must be on cpu (where q is), got meta",
    ),
    (
        dict(rotary=(TABLE, TABLE.clone().requires_grad_())),
        ValueError,
        "rotary's sin must not require a gradient: none is computed for it",
    ),
    (
        dict(q=Q[..., :15], k=Q[..., :15], v=Q[..., :15], rotary=(TABLE, TABLE)),
        ValueError,
        "q must have an even head dimension with rotary, got [2, 5, 2, 15]",
    ),
    (dict(window=64), TypeError, "window must be a tuple or list of ints, got int"),
    (dict(window=(1,)), ValueError, "window must be (left, right), got 1 ints"),
    (dict(window=(1, 1.0)), TypeError, "window must be a tuple or list of ints, got one with flo"),
    (dict(window=(1, -1)), ValueError, "window must have ints of 0 or more, got -1"),
    (dict(distance_bias=[1]), TypeError, "distance_bias must be a tensor, got list"),
    (
        dict(distance_bias=torch.ones(2, 4)),
        ValueError,
        "distance_bias must have shape [2, 2 * reach + 1] (heads, distances), got [2, 4]",
    ),
    (dict(distance_bias=torch.ones(3, 5)), ValueError, "(heads, distances), got [3, 5]"),
    (
        dict(distance_bias=torch.ones(2, 5, dtype=torch.int64)),
        TypeError,
        "distance_bias must have dtype float64, float32, float16 or bfloat16, got torch.int64",
    ),
    (
        dict(distance_bias=torch.ones(2, 5, device="meta")),
        ValueError,
        "distance_bias must be on cpu (where q is), got meta",
    ),
    # what is no ordinary tensor
    (dict(q=Q.to_sparse()), TypeError, "q must be a dense tensor, got one of layout torch.sparse"),
    (dict(k=Q.to_sparse()), TypeError, "k must be a dense tensor, got one of layout torch.sparse"),
    (dict(v=Q.to_mkldnn()), TypeError, "v must be a dense tensor, got one of layout torch._mkldnn"),
    (dict(q=NESTED), TypeError, "q must be a dense tensor, got a nested one"),
    (dict(k=NESTED), TypeError, "k must be a dense tensor, got a nested one"),
    (
        dict(q=Q.to(torch.float8_e4m3fn)),
        TypeError,
        "q must have dtype float64, float32, float16 or bfloat16, got torch.float8_e4m3fn",
    ),
    (dict(q=Q.to(torch.complex64)), TypeError, "q must have dtype float64, float32, float16 or"),
    (
        dict(key_mask=torch.ones(2, 5, dtype=torch.bool).to_sparse()),
        TypeError,
        "key_mask must be a dense tensor, got one of layout torch.sparse_coo",
    ),
    (
        dict(key_mask=torch.ones(2, 5, dtype=torch.bool, device="meta")),
        ValueError,
        "key_mask must be on cpu (where q is), got meta",
    ),
    # numbers
    (dict(scale=10**400), ValueError, "scale must be finite in float32, got an int of 1329 bits"),
    (dict(scale=float("nan")), ValueError, "scale must be finite in float32, got nan"),
    (dict(scale=-float("inf")), ValueError, "scale must be finite in float32, got -inf"),
    (dict(scale=1e39), ValueError, "scale must be finite in float32, got 1e+39"),
    (dict(scale=True), TypeError, "scale must be a number, got bool"),
    (dict(scale=torch.tensor(1.0)), TypeError, "scale must be a number, got Tensor"),
    (dict(dropout_p=True), TypeError, "dropout_p must be a number, got bool"),
    (dict(dropout_p=10**400), ValueError, "dropout_p must be between 0 and 1, got an int of"),
    (dict(site=True), TypeError, "site must be an int, got bool"),
    (dict(site=2**31), ValueError, "site must be between 0 and 2**31 - 1, got 2147483648"),
    (dict(seed=torch.ones(1).to_sparse()), TypeError, "seed must be a dense tensor"),
    # names and plans
    (dict(backend=["torch"]), ValueError, "backend must be one of 'auto', 'torch', 'triton', 'cu"),
    (dict(backend=None), ValueError, "backend must be one of 'auto', 'torch', 'triton', 'cuda', g"),
    (dict(plan="x"), ValueError, "plan must be None where q is padded, got str"),
    (
        PACKED_CALL | dict(plan="x"),
        TypeError,
        "plan must be what bertfast.packing.plan returns, got str",
    ),
    # the layout of a packed batch
    (PACKED_CALL | dict(max_seqlen=True), TypeError, "max_seqlen must be an int, got bool"),
    (
        PACKED_CALL | dict(max_seqlen=2**40),
        ValueError,
        "max_seqlen must be between 0 and 2**31 - 1, got 1099511627776",
    ),
    (
        PACKED_CALL | dict(max_seqlen=-1),
        ValueError,
        "max_seqlen must be between 0 and 2**31 - 1, got -1",
    ),
    (
        PACKED_CALL | dict(cu_seqlens=CU.view(1, 3)),
        ValueError,
        "cu_seqlens must have shape [sequences + 1], got [1, 3]",
    ),
    (
        PACKED_CALL | dict(cu_seqlens=CU.to_sparse()),
        TypeError,
        "cu_seqlens must be a dense tensor",
    ),
    (
        PACKED_CALL | dict(cu_seqlens=CU.to("meta")),
        ValueError,
        "cu_seqlens must be on cpu (where q is), got meta",
    ),
    (
        PACKED_CALL | dict(cu_seqlens=CU[:2]),
        ValueError,
        "cu_seqlens must end at 10, q's tokens, got 4",
    ),
    (
        PACKED_CALL | dict(cu_seqlens=torch.tensor([0, 8, 4, 10], dtype=torch.int32)),
        ValueError,
        "cu_seqlens must not decrease",
    ),
    (
        PACKED_CALL | dict(plan=packing.plan(torch.tensor([0, 6, 12], dtype=torch.int32), 6)),
        ValueError,
        "plan must be made for 10 tokens (q's), got one for 12",
    ),
    (
        PACKED_CALL | dict(plan=packing.plan(torch.tensor([0, 5, 10], dtype=torch.int32), 6)),
        ValueError,
        "plan must be made from cu_seqlens: it has other lengths",
    ),
    (
        PACKED_CALL | dict(plan=packing.plan(CU, 6).to("meta")),
        ValueError,
        "plan must be on cpu (where cu_seqlens is), got meta",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=lambda value: str(value)[:30])
def test_error_text(change, error, text):
    with pytest.raises(error, match=re.escape(text)):
        attention(**dict(q=Q, k=Q, v=Q) | change)


def test_one_buffer_error_text():
    for bad in (Q, torch.randn(2, 5, 4, 2, 16)):
        with pytest.raises(ValueError, match=re.escape("qkv must have shape [batch, length, 3")):
            attention_qkv(bad)
    with pytest.raises(TypeError, match="qkv must be a tensor, got NoneType"):
        attention_qkv(None)
    text = "plan must be made for 9 tokens (qkv's), got one for 10"
    with pytest.raises(ValueError, match=re.escape(text)):
        attention_qkv(
            *(torch.randn(9, 3, 2, 16),),
            **dict(cu_seqlens=CU, max_seqlen=6, plan=packing.plan(CU, 6, 10)),
        )


def test_a_bad_call_draws_nothing():
    """A refused call leaves torch's generator where it was."""
    before = torch.get_rng_state()
    for bad in (dict(backend="cudnn"), dict(scale="1"), dict(backend="cuda", q=Q.double())):
        q = bad.pop("q", Q)
        with pytest.raises((TypeError, ValueError)):
            attention(q, q, q, dropout_p=0.1, **bad)
    assert torch.equal(before, torch.get_rng_state())


# What a plan is made from.

PLAN = dict(cu_seqlens=CU, max_seqlen=6, total=10)
BAD_PLANS = [
    (dict(max_seqlen=-1), ValueError, "max_seqlen must be between 0 and 2**31 - 1, got -1"),
    (dict(max_seqlen=2**31), ValueError, "max_seqlen must be between 0 and 2**31 - 1, got 21474"),
    (dict(max_seqlen=6.0), TypeError, "max_seqlen must be an int, got float"),
    (dict(max_seqlen=float("nan")), TypeError, "max_seqlen must be an int, got float"),
    (dict(max_seqlen=None), TypeError, "max_seqlen must be an int, got NoneType"),
    (dict(max_seqlen=True), TypeError, "max_seqlen must be an int, got bool"),
    (dict(max_seqlen=5), ValueError, "max_seqlen must be at least the longest sequence, 6, got 5"),
    (dict(cu_seqlens=None), TypeError, "cu_seqlens must be an int32 tensor, got NoneType"),
    (dict(cu_seqlens=[0, 4, 10]), TypeError, "cu_seqlens must be an int32 tensor, got list"),
    (dict(cu_seqlens=CU.long()), TypeError, "cu_seqlens must have dtype torch.int32, got torch.in"),
    (dict(cu_seqlens=CU.float()), TypeError, "cu_seqlens must have dtype torch.int32, got torch.f"),
    (dict(cu_seqlens=CU.bool()), TypeError, "cu_seqlens must have dtype torch.int32, got torch.bo"),
    (dict(cu_seqlens=CU[None]), ValueError, "cu_seqlens must have shape [sequences + 1], got [1,"),
    (dict(cu_seqlens=CU[0]), ValueError, "cu_seqlens must have shape [sequences + 1], got []"),
    (dict(cu_seqlens=CU[:0]), ValueError, "cu_seqlens must have shape [sequences + 1], got [0]"),
    (dict(cu_seqlens=CU + 1), ValueError, "cu_seqlens must begin with 0, got 1"),
    (dict(total=9), ValueError, "cu_seqlens must end at 9, total, got 10"),
    (dict(total=500), ValueError, "cu_seqlens must end at 500, total, got 10"),
    (dict(total=10.0), TypeError, "total must be an int, got float"),
    (dict(total=torch.tensor(10)), TypeError, "total must be an int, got Tensor"),
    (dict(total=-1), ValueError, "total must be between 0 and 2**31 - 1, got -1"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD_PLANS, ids=lambda value: str(value)[:30])
def test_plan_error_text(change, error, text):
    with pytest.raises(error, match=re.escape(text)):
        packing.plan(**PLAN | change)


BAD_LENGTHS = [
    (dict(lengths=None), TypeError, "lengths must be a tuple or list of ints, got NoneType"),
    (dict(lengths=7), TypeError, "lengths must be a tuple or list of ints, got int"),
    (dict(lengths=[3, 2.0]), TypeError, "lengths must be a tuple or list of ints, got one with fl"),
    (dict(lengths=[True]), TypeError, "lengths must be a tuple or list of ints, got one with bool"),
    (dict(lengths=torch.ones(2)), TypeError, "lengths must be a tuple or list of ints, got Tensor"),
    (dict(lengths=[3, -1]), ValueError, "lengths must have ints of 0 or more, got -1"),
    (dict(lengths=[2**31]), ValueError, "lengths must add up to 2**31 - 1 or less, got 214748364"),
    (
        dict(device="nonsense"),
        ValueError,
        "device must be a torch.device or the name of one, got '",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "text"), BAD_LENGTHS, ids=lambda value: str(value)[:30]
)
def test_lay_out_error_text(change, error, text):
    with pytest.raises(error, match=re.escape(text)):
        packing.lay_out(**dict(lengths=[4, 6]) | change)


@pytest.mark.parametrize("made", ["plan", "lay_out"])
def test_a_plan_knows_when_cu_seqlens_changed_under_it(made):
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    if made == "plan":
        plan = packing.plan(cu, 6, 10)
    else:
        cu, plan = packing.lay_out([4, 6])
    cu[1] = 5
    with pytest.raises(ValueError, match="plan must be made from cu_seqlens: it has other lengths"):
        attention(PACKED, PACKED, PACKED, cu_seqlens=cu, max_seqlen=6, plan=plan)


def test_a_plan_of_a_device_is_held_to_the_tokens_without_a_look_at_it():
    """As on a GPU, whose lengths the host does not know: only shapes and numbers are compared."""
    cu = CU.to("meta")
    plan = packing.Plan(
        *(torch.zeros((4, 3), dtype=torch.int32, device="meta"), cu[:1]),
        **dict(tile=32, sequences=2, max_seqlen=6, total=8),
    )
    q = PACKED.to("meta")
    with pytest.raises(
        ValueError, match=re.escape("plan must be made for 10 tokens (q's), got on")
    ):
        attention(q, q, q, cu_seqlens=cu, max_seqlen=6, plan=plan)


# How long a sequence may be.


def test_a_generous_max_seqlen_serves_a_short_batch(target, need, finest):
    need("attention", target)
    backend, device = target
    q, k, v = torch.randn(3, 10, 2, 16, device=device).to(finest("attention", target))
    cu = CU.to(device)
    outs = []
    for longest in (6, 16384, 2**31 - 1):
        for plan in (None, packing.plan(cu, longest, 10)):
            options = dict(cu_seqlens=cu, max_seqlen=longest, plan=plan, backend=backend)
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = attention(*leaves, **options)
            outs.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for other in outs[1:]:
        for got, want in zip(other, outs[0], strict=True):
            torch.testing.assert_close(got, want)


def test_a_sequence_longer_than_any_line_of_the_table(target, need):
    need("attention", target)
    backend, device = target
    q, k = torch.randn(2, 1, 8200, 1, 8, device=device, dtype=torch.float16)
    mask = torch.zeros(1, 8200, dtype=torch.bool, device=device)
    mask[:, 8190:] = True  # few, so that the interpreter is done soon
    out = attention(q, k, k, key_mask=mask, backend=backend)
    want = attention(q.double(), k.double(), k.double(), key_mask=mask)
    # A mean of ten values below 4: the weights' roundings and the output's.
    assert (out.double() - want).abs().max() < 2 * 4 * torch.finfo(q.dtype).eps


def test_sizes_beyond_a_limit_are_refused_in_words(target, need):
    need("attention", target)
    backend, device = target
    q = torch.zeros((), dtype=torch.float16, device=device)
    many = q.expand(2**20, 2**10, 2**6, 8)
    text = "sequences * heads * (longest sequence + 128) must be at most 34359738368, got"
    with pytest.raises(ValueError, match=re.escape(text)):
        attention(many, many, many, backend=backend)


@pytest.mark.host
def test_a_long_masked_row_is_refused_as_the_binding_would(need):
    need("attention", ("cuda", "cpu"))
    length = limits.MAX_MASKED_LENGTH + 1
    q = torch.zeros((), dtype=torch.float16).expand(1, length, 1, 8)
    mask = torch.ones(1, length, dtype=torch.bool)
    text = "a row with a key_mask must have at most 131072 tokens, got 131073"
    with pytest.raises(ValueError, match=re.escape(text)):
        attention(q, q, q, key_mask=mask, backend="cuda")
    with pytest.raises(ValueError, match=re.escape("has at most 2**17 tokens, got 131073")):
        registered.infer.direct(q, q, q, mask, None, None, 0, None, 0, 1.0, 0, 0, "cuda")
