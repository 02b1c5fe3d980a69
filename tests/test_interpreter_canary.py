"""Faults of Triton's interpreter today. The day one of these tests fails, a workaround can go."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from bertfast.ops.triton_lib import round_to  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is not interpreting here"
    ),
]


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, UPCAST: tl.constexpr):
    index = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + index), tl.load(b_ptr + index)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(out_ptr + index, tl.dot(a, b, out_dtype=tl.float32))


@triton.jit
def _add(a_ptr, b_ptr, out_ptr):
    index = tl.arange(0, 256)
    total = tl.load(a_ptr + index) + tl.load(b_ptr + index)
    tl.store(out_ptr + index, total.to(tl.float32))


@triton.jit
def _cast(x_ptr, out_ptr):
    index = tl.arange(0, 256)
    tl.store(out_ptr + index, tl.load(x_ptr + index).to(tl.bfloat16))


@triton.jit
def _round(x_ptr, out_ptr):
    index = tl.arange(0, 256)
    tl.store(out_ptr + index, round_to(tl.load(x_ptr + index), tl.bfloat16))


def _bf16_pair():
    return torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()


def test_bf16_dot_is_garbage_unless_upcast():
    a, b = _bf16_pair()
    right = a.double() @ b.double()
    out = torch.empty(16, 16)
    _dot[(1,)](a, b, out, UPCAST=False)
    assert not (out - right).abs().max() < 1e6
    _dot[(1,)](a, b, out, UPCAST=True)
    assert (out - right).abs().max() < 1e-5


def test_bf16_sum_is_garbage():
    a, b = _bf16_pair()
    out = torch.empty(16, 16)
    _add[(1,)](a, b, out)
    assert not (out - (a.float() + b.float())).abs().max() < 0.1


def test_cast_to_bf16_truncates_and_round_to_does_not():
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.4e38, 1e-37, 1.00390625])
    x = torch.cat([special, torch.randn(248)])
    out = torch.empty(256, dtype=torch.bfloat16)
    _cast[(1,)](x, out)
    truncated = (x[8:].view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(out[8:].float(), truncated)
    _round[(1,)](x, out)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[~x.isnan()], x.bfloat16()[~x.isnan()])
