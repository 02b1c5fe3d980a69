"""Shared memory of the CUDA kernels: each fits the GPUs that have least of it (99 KB a block)."""

import pytest
import torch

from bertfast.ops import attention, layer_norm, linear_gated, linear_gelu
from bertfast.ops.attention.limits import MAX_HEAD_DIM, MAX_MASKED_LENGTH

pytestmark = pytest.mark.host
BF16 = torch.bfloat16


def longest_attention():
    """With all that a block keeps beside its tiles: a bit a key, and dropout's words."""
    for head_dim in (32, 64, 96, MAX_HEAD_DIM):
        shape = (1, MAX_MASKED_LENGTH, 1, head_dim)
        q, k, v = (torch.empty(shape, dtype=BF16, requires_grad=True) for _ in range(3))
        mask = torch.ones(shape[:2], dtype=torch.bool)
        out = attention(q, k, v, key_mask=mask, dropout_p=0.1, backend="cuda")
        out.backward(torch.empty_like(out))


def widest_layer_norm():
    for dtype in (BF16, torch.float32):
        x, weight, bias = (
            torch.empty(shape, dtype=dtype, requires_grad=True) for shape in ((4, 8192), 8192, 8192)
        )
        y = layer_norm(x, weight, bias, backend="cuda")
        y.backward(torch.empty_like(y))


def products():
    for rows in (8, 4096):
        x, weight, bias = (
            torch.empty(shape, dtype=BF16, requires_grad=True)
            for shape in ((rows, 768), (3072, 768), (3072,))
        )
        for op in (linear_gelu, linear_gated):
            y = op(x, weight, bias, fused=True, backend="cuda")
            y.backward(torch.empty_like(y))


@pytest.mark.parametrize("calls", [longest_attention, widest_layer_norm, products])
def test_each_kernel_fits_99_kilobytes(host_runtime, calls):
    host_runtime.set_dry_launch(True)
    host_runtime.set_gpu(86)
    host_runtime.reset_records()
    calls()
    assert host_runtime.launch_count() >= 2
