"""attention's forward by bulk copies and wgmma, in its build for the host: which calls it takes,
and that it computes what the kernel of every GPU does.

The forms, orders and the error budget are in test_attention_cuda.py.
"""

import itertools
import re
from pathlib import Path

import pytest
import torch

from bertfast import packing
from bertfast.ops import attention

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[1]

HOPPER, OTHER = 90, 100


def run(host_runtime, capability, *tensors, **options):
    """The output, and whether the kernel was this one."""
    host_runtime.set_gpu(capability)
    host_runtime.reset_records()
    out = attention(*tensors, backend="cuda", **options)
    return out, any("forward_bulk" in record[0] for record in host_runtime.bank_conflicts())


def both(host_runtime, *tensors, **options):
    """Outputs by this kernel and by the other one. Of heads of 64 both meet keys in the same blocks
    and sum in the same order, here where products do too: they are the same bits."""
    out, is_bulk = run(host_runtime, HOPPER, *tensors, **options)
    other, is_other_bulk = run(host_runtime, OTHER, *tensors, **options)
    assert is_bulk and not is_other_bulk
    return out, other


def packed(lengths, planned):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    options = dict(cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
    if planned:
        options["plan"] = packing.plan(cu_seqlens, max(lengths), sum(lengths))
    return options


@pytest.mark.parametrize("planned", [False, True])
def test_lengths_around_tiles_and_blocks(host_runtime, planned):
    lengths = [64, 1, 128, 129, 191, 192, 193, 65, 0, 257]
    tensors = torch.randn(3, sum(lengths), 1, 64).half()
    out, other = both(host_runtime, *tensors, **packed(lengths, planned))
    assert torch.equal(out, other)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_masks_that_begin_and_end_anywhere(host_runtime, p):
    """With dropout a tile may begin before its sequence does."""
    mask = torch.zeros(4, 260, dtype=torch.bool)
    mask[0, 5:199] = mask[1, 64:192] = mask[2, 130:131] = True
    q, k, v = torch.randn(3, 4, 260, 1, 64).half()
    k[~mask], v[~mask] = torch.inf, torch.nan
    options = dict(key_mask=mask, dropout_p=p, seed=torch.tensor([7]))
    out, other = both(host_runtime, q, k, v, **options)
    assert torch.equal(out, other) and not out.isnan().any()


def test_what_lies_behind_a_sequence_gets_into_nothing(host_runtime):
    """Copies of 64 rows cross a sequence's end, and short sequences share a tile."""
    lengths = [20, 30, 140, 10, 130]
    options = packed(lengths, True)
    tensors = torch.randn(3, sum(lengths), 1, 64).half()
    clean, _ = run(host_runtime, HOPPER, *tensors, **options)
    rows = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    for spoilt in (1, 3, 4):
        tensors_with = tensors.clone()
        tensors_with[1:, rows == spoilt] = torch.nan
        out, _ = both(host_runtime, *tensors_with, **options)
        assert torch.equal(out[rows != spoilt], clean[rows != spoilt])
        assert out[rows == spoilt].isnan().all()


def test_calls_that_the_other_kernel_keeps(host_runtime):
    """Short ones; sequences that share tiles of 32; strides that no tensor map can have."""
    q, k, v = torch.randn(3, 2, 140, 2, 64).half()
    assert run(host_runtime, HOPPER, q, k, v)[1]
    assert not run(host_runtime, HOPPER, q[:, :128], k[:, :128], v[:, :128])[1]
    many = [3] * 80 + [140]
    tensors = torch.randn(3, sum(many), 1, 64).half()
    assert packed(many, True)["plan"].tile == 32
    assert not run(host_runtime, HOPPER, *tensors, **packed(many, True))[1]
    one_head = k[:, :, :1].expand_as(k)
    out, is_bulk = run(host_runtime, HOPPER, q, one_head, v)
    assert not is_bulk and torch.equal(out, run(host_runtime, HOPPER, q, one_head.clone(), v)[0])
    # A sequence that begins between two positions of the one before.
    room = torch.randn(2 * 140 * 2 * 64 + 64).half()
    askew = room.as_strided((2, 140, 2, 64), (140 * 128 + 64, 128, 64, 1))
    out, is_bulk = run(host_runtime, HOPPER, q, askew, v)
    assert not is_bulk and torch.equal(out, run(host_runtime, HOPPER, q, askew.clone(), v)[0])


# Planted faults: the kernel as it is, but for the calls of one line.

SOURCES = ("csrc/kernels/attention/forward_bulk.cu", "csrc/device/attention/stream.cuh")
ORDERS = r"\b(mbarrier_(init_fence|arrive\w*|wait)|named_barrier_\w+|wgmma_(fence|commit|wait<.>)"
ORDERS += r"|async_proxy_fence|__syncthreads)\("
FAULTS = [
    pytest.param(source, line, id=f"{Path(source).stem}-{line}-{found[1]}")
    for source in SOURCES
    for line, text in enumerate((ROOT / source).read_text().splitlines(), 1)
    if (found := re.search(ORDERS, text))
]


def test_what_orders_the_kernel_is_found():
    assert len(FAULTS) >= 16


@pytest.mark.parametrize("source, line", FAULTS)
def test_nothing_that_orders_the_kernel_can_be_left_out(host_runtime, source, line):
    """Each wait, arrival, fence and barrier: without it some check fails. More blocks of keys than
    there are stages, one of them masked, and whole ones alone; two sequences that fill a tile, with
    a NaN in one."""
    host_runtime.set_gpu(HOPPER)
    long = torch.randn(3, 1, 470, 1, 96).half()
    mask = torch.arange(470)[None] != 70
    short = torch.randn(3, 64 + 129, 1, 64).half()
    short[2, 3] = torch.nan

    def run_all():
        attention(*long, key_mask=mask, backend="cuda")
        attention(*long[:, :, :192], backend="cuda")
        attention(*short, **packed([24, 40, 129], True), backend="cuda")

    run_all()
    host_runtime.leave_out(source, line)
    for order in ("depth-first", "random"):
        host_runtime.set_schedule(order, 1)
        with pytest.raises(RuntimeError, match=r"race on byte|deadlock|under way|\.cuh?:\d+"):
            run_all()
