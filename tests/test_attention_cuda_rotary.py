"""The CUDA C++ kernel that rotates attention's queries and keys, in its build for the host."""

from typing import NamedTuple

import pytest
import torch
from test_bindings import OF_HEADS, Call, apart, as_double, longer, off, refused, shorter

from bertfast import packing
from bertfast.ops import native
from bertfast.ops.attention.run import Heads
from bertfast.packing.sequences import Sequences
from bertfast.testing import positions

pytestmark = pytest.mark.host

HALF, BF16 = torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def _needs_the_host_build(host_runtime):
    pass


# The kernel that rotates.


def rotated(x, cos, sin):
    """(rows, length, heads, head_dim), each product and their sum rounded, as this build rounds."""
    return positions.rotated(x.transpose(1, 2), (cos, sin)).transpose(1, 2)


def one_after_the_other(x, tables, lengths):
    """Packed sequences, each rotated by itself, rounded once."""
    parts = [rotated(part.float()[None], *tables)[0] for part in x.split(lengths)]
    return torch.cat(parts).to(x.dtype)


def by_kernel(heads, sequences, tables):
    q = heads.q if isinstance(heads, Heads) else heads.unbind(-3)[0]
    outs = tuple(torch.full(q.shape, torch.nan, dtype=q.dtype) for _ in "qk")
    module = native.module_for(q)
    module.attention_rotate(heads, sequences, tables, outs)
    return outs


@dtypes
@pytest.mark.parametrize("head_dim", [2, 6, 8, 24, 32, 40, 64, 96, 126, 128])
def test_a_padded_batch_is_rotated_by_its_rows(head_dim, dtype):
    qkv = torch.randn(2, 70, 3, 5, head_dim).to(dtype)
    qkv[0, 3] = torch.nan
    tables = positions.tables(90, head_dim)
    found = by_kernel(qkv, Sequences(), tables)
    for got, x in zip(found, qkv.unbind(-3), strict=False):
        right = rotated(x.float(), *tables).to(dtype)
        assert torch.equal(got.nan_to_num(7.0), right.nan_to_num(7.0))


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("lengths", [(5, 0, 30, 20, 70, 129, 1), (3,) * 40 + (20,), (64, 200)])
def test_a_packed_batch_is_rotated_sequence_by_sequence(lengths, planned):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    sequences = Sequences(None, cu, max(lengths))
    if planned:
        plan = packing.plan(cu, max(lengths), sum(lengths))
        sequences = sequences._replace(tiles=plan.tiles, tile=plan.tile)
    heads = Heads(*torch.randn(3, sum(lengths), 3, 48).half())
    tables = positions.tables(max(lengths), 48)
    for got, x in zip(by_kernel(heads, sequences, tables), heads, strict=False):
        assert torch.equal(got, one_after_the_other(x, tables, lengths))


@pytest.mark.parametrize(
    "where", [dict(start=4), dict(start=1), dict(step=36), dict(step=33)], ids=str
)
def test_heads_that_do_not_lie_in_whole_vectors(where):
    """They are read in parts that do."""
    start, step = where.get("start", 0), where.get("step", 32)
    room = torch.randn(3, start + 2 * 20 * 3 * step).half()
    heads = Heads(*(x[start:].view(2, 20, 3, step)[..., :32] for x in room))
    tables = positions.tables(20, 32)
    for got, x in zip(by_kernel(heads, Sequences(), tables), heads, strict=False):
        assert torch.equal(got, rotated(x.float(), *tables).half())


def test_memory_that_is_not_what_the_kernel_takes_it_for():
    host = native.module_for(torch.empty(0))
    heads = Heads(*torch.randn(3, 2, 20, 2, 16).half())
    outs = Outs(*(torch.empty_like(heads.q) for _ in "qk"))
    arguments = {
        "heads": heads,
        "sequences": Sequences(),
        "tables": Tables(*positions.tables(20, 16)),
        "rotated": outs,
    }
    call = Call(host, "attention_rotate", arguments)
    of_heads = [spoil for spoil in OF_HEADS if spoil.__name__ != "as_half"]
    cases = dict.fromkeys(("k", "rotated_q", "rotated_k"), (*of_heads, torch.Tensor.bfloat16))
    of_tables = (apart, as_double, off, shorter, torch.Tensor.flatten)
    refused(call, cases | dict.fromkeys(("cos", "sin"), of_tables) | {"sin": (longer,)})
    for head_dim in (14, 18):
        with pytest.raises(AssertionError, match="cos as a row of half a head's columns"):
            by_kernel(heads, Sequences(), positions.tables(20, head_dim))
    odd = Heads(*torch.randn(3, 2, 20, 2, 15).half())
    with pytest.raises(AssertionError, match="cos as a row of half a head's columns"):
        by_kernel(odd, Sequences(), positions.tables(20, 14))


class Outs(NamedTuple):
    rotated_q: torch.Tensor
    rotated_k: torch.Tensor


class Tables(NamedTuple):
    cos: torch.Tensor
    sin: torch.Tensor


@pytest.mark.parametrize("fault", ["sign", "the row's positions"])
def test_a_wrong_rotation_is_seen(fault):
    """The bits above are compared with tables, and sequences, that make a difference."""
    lengths = (17, 40, 9)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    heads = Heads(*torch.randn(3, sum(lengths), 1, 64).half())
    cos, sin = positions.tables(sum(lengths), 64)
    sequences, tables = Sequences(None, cu, max(lengths)), (cos, sin)
    if fault == "sign":
        tables = cos, -sin
    else:
        sequences = Sequences(None, cu[[0, -1]], sum(lengths))
    right = one_after_the_other(heads.q, (cos, sin), lengths)
    assert torch.equal(by_kernel(heads, Sequences(None, cu, max(lengths)), (cos, sin))[0], right)
    assert (by_kernel(heads, sequences, tables)[0] - right).abs().max() > 1


@pytest.mark.parametrize("head_dim", [64, 24, 6])
def test_same_bits_in_every_scheduling_order(host_runtime, head_dim):
    qkv, tables = torch.randn(2, 70, 3, 5, head_dim).half(), positions.tables(70, head_dim)
    results = []
    for order in ("depth-first", "reverse", "random"):
        host_runtime.set_schedule(order, 1)
        results.append(by_kernel(qkv, Sequences(), tables))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nothing_is_written_beside_the_heads():
    """Nor where a group of heads isn't whole."""
    q, k, v = torch.randn(3, 3, 70, 7, 32).half()
    room = torch.full((2, 3, 70, 9, 48), 7.0).half()
    outs = tuple(x[..., 1:8, 8:40] for x in room)
    native.module_for(q).attention_rotate(
        Heads(q, k, v), Sequences(), positions.tables(70, 32), outs
    )
    for x, out in zip((q, k), outs, strict=True):
        assert torch.equal(out, rotated(x.float(), *positions.tables(70, 32)).half())
        out.fill_(7.0)
    assert bool((room == 7).all())
