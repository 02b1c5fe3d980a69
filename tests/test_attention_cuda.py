"""attention's CUDA C++ kernels: what only they have, and what only their build for the host shows.

The case table, the properties and the registration are in test_attention.py, for every backend.
"""

import math
import re

import pytest
import torch

from bertfast import packing
from bertfast.ops import attention, dropout_keep_mask
from bertfast.ops.attention import cuda
from bertfast.testing import attention as table
from bertfast.testing import hold_to_budget
from bertfast.testing.attention import Case

pytestmark = pytest.mark.host

HALF, BF16 = torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])

# Every head dimension with a kernel, more than one block of queries and of keys, and each layout.
FORMS = [Case((70,), head_dim=d, p=p) for d in (32, 64, 96, 128) for p in (0.0, 0.1)]
FORMS += [
    Case((24, 100), mask="left", p=0.2),
    Case((70, 40), mask="holes", values="spoilt", head_dim=64),
    Case((17, 0, 40, 70, 3), packed=True, p=0.1, head_dim=64),
    Case((17, 0, 40, 70, 3), packed=True, plan=True, p=0.1, head_dim=96),
    Case((5, 20, 30), packed=True, plan=True, head_dim=64),
]
# On Hopper heads of 64 are multiplied by wgmma, and of long sequences all heads, by bulk copies:
# more blocks of keys than there is room for, and pairs of tiles with one and with two of them. By
# mma.sync that many multiprocessors don't get tiles of 128.
LONG = [Case((193,), head_dim=d, p=0.1) for d in (32, 96, 128)]
LONG += [
    Case((330,), head_dim=64),
    Case((150, 200), mask="left", p=0.2, head_dim=64),
    Case((150, 180), mask="holes", values="spoilt", head_dim=64),
    Case((17, 0, 130, 40, 3), packed=True, p=0.1, head_dim=64),
    Case((17, 0, 130, 40, 3, 256), packed=True, plan=True, p=0.1, head_dim=64),
    Case((20, 140), packed=True, plan=True, head_dim=72),
]
forms = pytest.mark.parametrize(
    "multiply_by, case",
    [("mma.sync", case) for case in FORMS]
    + [("wgmma", case) for case in FORMS if case.head_dim == 64]
    + [("bulk", case) for case in LONG],
    indirect=["multiply_by"],
    ids=str,
)


@pytest.fixture(autouse=True)
def _needs_the_host_build(host_runtime):
    pass


@pytest.fixture
def multiply_by(request, host_runtime):
    host_runtime.set_gpu(100 if request.param == "mma.sync" else 90, 1000)
    return request.param


def same_bits(one, other):
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# The host build's checks. Races, accesses outside shared memory, copies that nobody waits for and
# deadlocks raise by themselves in every test.


@forms
def test_same_bits_in_every_scheduling_order(host_runtime, multiply_by, case):
    results = []
    for order, seed in (("depth-first", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        host_runtime.set_schedule(order, seed)
        results.append(table.run(table.make_inputs(case, HALF), "cuda"))
    for other in results[1:]:
        same_bits(results[0], other)


@dtypes
@forms
def test_budget_holds_when_sums_are_cut_off_and_approximations_off(
    host_runtime, multiply_by, case, dtype
):
    host_runtime.set_perturb(True, 1)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@forms
def test_no_bank_conflicts(host_runtime, multiply_by, case):
    host_runtime.reset_records()
    table.run(table.make_inputs(case, HALF), "cuda")
    records = host_runtime.bank_conflicts()
    # Copies, three kinds of operands, and the way out; each is a line of its own.
    assert sum("tile.cuh" in record[0] or "mma.cuh" in record[0] for record in records) >= 5
    # The backward's rows of dout that end in a part of a slab are read with some, once a tile.
    excused = "backward_dq_bulk.cu" if 64 < case.head_dim <= 96 else "none"
    assert [record for record in records if record[1] > 1 and excused not in record[0]] == []


# Tiles of 128 queries, or keys, with what differs in them: where they lie in shared memory, by the
# head dimension; the rest of a sequence, in a tile of 64; a plan's list of both kinds; keys that
# don't count, in each 32 of a tile.
DOUBLE = [
    Case((150,), head_dim=32, p=0.1),
    Case((200,), head_dim=64),
    Case((90, 140), mask="left", head_dim=64, p=0.2),
    Case((70, 200), mask="holes", values="spoilt", head_dim=96),
    Case((128, 200), mask="holes", values="spoilt", head_dim=64),
    Case((130, 190), mask="left", head_dim=32, p=0.2),
    Case((140,), head_dim=128, p=0.1),
    Case((170, 150), packed=True, head_dim=32),
    Case((17, 30, 0, 200, 140, 3), packed=True, plan=True, head_dim=64, p=0.1),
]


def shared_accesses(
    host_runtime, multiprocessors: int, inputs: dict, capability: int = 80
) -> tuple[int, int]:
    """Of the forward, and of a backward."""
    host_runtime.set_gpu(capability, multiprocessors)
    host_runtime.reset_records()
    heads = [inputs[name].clone().requires_grad_() for name in table.NAMES]
    out = attention(*heads, **table.options(inputs), backend="cuda")
    forward = sum(accesses for _, _, accesses in host_runtime.bank_conflicts())
    out.backward(inputs["dout"])
    return forward, sum(accesses for _, _, accesses in host_runtime.bank_conflicts()) - forward


@pytest.mark.parametrize("case", DOUBLE, ids=str)
def test_tiles_of_128_give_the_bits_of_tiles_of_64(host_runtime, case):
    """In each order of threads, with a negative scale too."""
    inputs = table.make_inputs(case, BF16)
    inputs["scale"] = -0.125 if case.head_dim == 128 else 0.125
    host_runtime.set_gpu(80, 1000)
    expected = table.run(inputs, "cuda")
    host_runtime.set_gpu(80, 1)
    for order, seed in (("depth-first", 0), ("reverse", 0), ("random", 1)):
        host_runtime.set_schedule(order, seed)
        host_runtime.reset_records()
        same_bits(expected, table.run(inputs, "cuda"))
        assert [record for record in host_runtime.bank_conflicts() if record[1] > 1] == []
    larger, smaller = (shared_accesses(host_runtime, n, inputs) for n in (1, 1000))
    assert larger[0] < smaller[0]
    assert (larger[1] < smaller[1]) == (case.head_dim <= 64)  # dq has no registers for wider ones


@pytest.mark.parametrize("head_dim", [32, 64, 96])
def test_tiles_of_128_keys_read_the_statistics_half_as_often(host_runtime, head_dim):
    inputs = table.make_inputs(Case((256,), head_dim=head_dim), BF16)
    reads = []
    for multiprocessors in (1, 1000):
        host_runtime.set_gpu(80, multiprocessors)
        host_runtime.reset_records()
        table.run(inputs, "cuda")
        records = host_runtime.bank_conflicts()
        reads.append(sum(accesses for place, _, accesses in records if "/dkv_" in place))
    assert reads[0] == (reads[1] / 2 if head_dim <= 64 else reads[1]) > 0


@pytest.mark.parametrize("case", [DOUBLE[2], DOUBLE[-1]], ids=str)
def test_tiles_of_128_are_within_the_budget(host_runtime, case):
    host_runtime.set_gpu(80, 1)
    host_runtime.set_perturb(True, 1)
    inputs = table.make_inputs(case, BF16)
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@pytest.mark.parametrize(
    "case, capability, multiprocessors, larger",
    [
        (Case((130,), heads=2), 80, 4, True),
        (Case((130,), heads=2), 86, 5, False),  # one would have nothing to do
        (Case((130,), heads=2), 90, 1, False),  # other kernels serve it
        (Case((64,)), 86, 1, False),
        (Case((70,), head_dim=128), 80, 1, True),
        (Case((70,), head_dim=128), 120, 1, False),  # without room for two blocks
        (Case((70, 20, 20), packed=True, plan=True), 80, 1, False),  # most are short
    ],
    ids=str,
)
def test_where_tiles_are_of_128(host_runtime, case, capability, multiprocessors, larger):
    inputs = table.make_inputs(case, BF16)
    counts = [shared_accesses(host_runtime, n, inputs, capability) for n in (multiprocessors, 1000)]
    assert (counts[0][0] < counts[1][0]) == larger
    assert (counts[0][1] < counts[1][1]) == (larger and case.head_dim <= 64)


def test_wgmma_reads_keys_and_values_itself(host_runtime):
    """So their way to registers, a line each, is gone."""
    q, k, v = torch.randn(3, 1, 64, 1, 64).to(HALF)
    loads = {}
    for wgmma in (False, True):
        host_runtime.set_gpu(90 if wgmma else 100)
        host_runtime.reset_records()
        attention(q, k, v, backend="cuda")
        places = [record[0] for record in host_runtime.bank_conflicts()]
        loads[wgmma] = {place for place in places if "tile.cuh" in place and "load" in place}
    assert loads[True] < loads[False] and len(loads[False] - loads[True]) == 2


# Dropout: the mask, read off the results bit for bit.


def drawn(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the forward and the backward, (batch, heads, queries, keys) booleans, of a case
    whose sequences are no longer than the head dimension.

    With v the identity, out is the dropped probabilities; with dout the identity, so is dv.
    """
    inputs = table.make_inputs(case, HALF)
    eye = torch.eye(case.head_dim, dtype=HALF)
    own = inputs["key_mask"]
    if case.packed:
        rows = torch.cat([torch.arange(n) for n in case.lengths])
    elif own is None:
        rows = torch.arange(case.lengths[0])[None]
        own = torch.ones(1, case.lengths[0], dtype=torch.bool)
    else:
        rows = (own.cumsum(1) - 1).clamp(min=0)
    identity = eye[rows][..., None, :].expand(*rows.shape, case.heads, case.head_dim)
    inputs["q"], inputs["v"], inputs["dout"] = inputs["q"] * 0.1, identity, identity
    if not case.packed:
        inputs["dout"] = identity * own[..., None, None]
    result = table.run(inputs, "cuda")
    parts = [result["out"], result["dv"]]
    if own is not None:
        parts = [
            torch.cat([row[mask] for row, mask in zip(part, own, strict=True)]) for part in parts
        ]
    kept = []
    for part in parts:
        padded = torch.zeros(len(case.lengths), case.head_dim, case.heads, case.head_dim)
        for index, sequence in enumerate(part.split(case.lengths)):
            padded[index, : len(sequence)] = sequence
        kept.append(padded.permute(0, 2, 1, 3) != 0)
    return kept[0], kept[1].transpose(-1, -2)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(
    "case",
    [
        Case((100,), heads=2, head_dim=128),
        Case((40, 96), head_dim=96, mask="right"),
        Case((23, 64), heads=2, head_dim=64, mask="left"),
        Case((32, 0, 5, 17), heads=2, head_dim=32, packed=True),
        Case((17, 0, 9, 30, 64, 1, 2), heads=2, head_dim=64, packed=True, plan=True),
        Case((3, 20, 30, 70, 7), head_dim=96, packed=True, plan=True),
        Case((9, 30, 2, 0, 15, 16, 1), heads=2, head_dim=32, packed=True, plan=True),
    ],
    ids=str,
)
def test_both_passes_draw_the_exported_mask(case, p):
    case = Case(**{**vars(case), "p": p})
    inputs = table.make_inputs(case, HALF)
    shape = (len(case.lengths), case.heads, case.head_dim, case.head_dim)
    mask = dropout_keep_mask(inputs["seed"], inputs["site"], shape, p, "attention")
    for index, length in enumerate(case.lengths):
        mask[index, :, length:] = False
        mask[index, :, :, length:] = False
    forward, backward = drawn(case)
    assert torch.equal(forward, mask)
    assert torch.equal(backward, mask)


# Layouts.


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_packed_and_padded_are_the_same_bits(p):
    """Both count from a sequence's first token and meet its keys in the same blocks."""
    case = Case((20, 70, 33, 130), heads=2, mask="right", p=p)
    inputs = table.make_inputs(case, BF16)
    own = inputs["key_mask"]
    inputs["dout"] = inputs["dout"] * own[:, :, None, None]
    padded = table.run(inputs, "cuda")
    packed = {name: inputs[name][own] for name in (*table.NAMES, "dout")}
    cu = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
    packed |= {"key_mask": None, "cu_seqlens": cu, "max_seqlen": 130}
    same_bits(
        table.run(inputs | packed, "cuda"), {name: value[own] for name, value in padded.items()}
    )


def test_one_buffer_is_read_and_written_in_place(host_runtime):
    copies = cuda._Copies(host_runtime)
    for part in torch.randn(2, 40, 3, 2, 64).half().unbind(-3):
        assert copies.read(part) is part and copies.write(part) is part


@pytest.mark.parametrize("head_dim", [1, 5, 12, 33, 127])
def test_head_dimensions_that_are_no_whole_vectors(head_dim):
    inputs = table.make_inputs(Case((40, 30), head_dim=head_dim, mask="right", p=0.1), HALF)
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@pytest.mark.parametrize("where", ["address", "stride"])
def test_what_is_not_aligned_is_copied(host_runtime, where):
    wide = torch.randn(3, 20, 2, 36 if where == "stride" else 48).half()
    tensors = wide[..., 1:33] if where == "address" else wide[..., :32]
    assert not any(map(host_runtime.attention_in_vectors, tensors))
    packed = dict(cu_seqlens=torch.tensor([0, 20], dtype=torch.int32), max_seqlen=20)
    out = attention(*tensors, **packed, backend="cuda")
    assert torch.equal(out, attention(*tensors.contiguous(), **packed, backend="cuda"))


def test_scale_of_zero_is_the_mean():
    q, k, v = torch.randn(3, 1, 70, 1, 32).half()
    mask = torch.arange(70)[None] < 50
    out = attention(q, k, v, key_mask=mask, scale=0.0, backend="cuda")
    mean = v[:, :50].double().mean(1, keepdim=True)
    assert (out - mean).abs().max() < 2 * 2**-11 * mean.abs().max()


def test_lse_is_the_binary_logarithm_of_the_sum():
    case = Case((70, 40), mask="right", head_dim=64)
    inputs = table.make_inputs(case, HALF)
    q, k, v = (inputs[name] for name in table.NAMES)
    layout = (inputs["key_mask"], None, None, 0, None)
    forward = torch.ops.bertfast.attention_forward
    _, lse = forward(q, k, v, *layout, 0, 0.125, 0, 0, "cuda")
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8
    scores = scores.masked_fill(~inputs["key_mask"][:, None, None], -math.inf)
    assert (lse - scores.logsumexp(-1) / math.log(2)).abs().max() < 2e-6


# Refusals.


def test_reasons():
    assert cuda.unsupported_reason("cpu") is None
    assert cuda.unsupported_reason("cpu", BF16, 64) is None
    assert cuda.unsupported_reason("cpu", HALF, 129) == (
        "the head dimension must be between 1 and 128, got 129"
    )
    with pytest.raises(ValueError, match=re.escape("got torch.float32")):
        attention(*torch.randn(3, 1, 4, 1, 32), backend="cuda")


def test_long_masked_sequences_fit(host_runtime):
    length = 5000
    q, k, v = torch.randn(3, 1, length, 1, 32).half()
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, 4000:4010] = True
    out = attention(q[:, :], k, v, key_mask=mask, backend="cuda")
    expected = attention(q.double(), k.double(), v.double(), key_mask=mask)
    assert (out - expected).abs().max() < 4 * 2**-11 * expected.abs().max()


def test_an_empty_plan_entry_does_nothing():
    q, k, v = torch.randn(3, 9, 1, 32).half()
    cu = torch.tensor([0, 9], dtype=torch.int32)
    roomy = packing.plan(cu, 640)  # ten entries, one in use
    assert roomy.tiles.shape[0] > 1
    out = attention(q, k, v, cu_seqlens=cu, max_seqlen=640, plan=roomy, backend="cuda")
    assert torch.equal(out, attention(q, k, v, cu_seqlens=cu, max_seqlen=9, backend="cuda"))


def test_tiles_of_32():
    case = Case((5, 20, 100, 0, 9, 3, 1, 2), heads=2, packed=True, plan=True, p=0.1)
    inputs = table.make_inputs(case, HALF)
    assert table.options(inputs)["plan"].tile == 32
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))
