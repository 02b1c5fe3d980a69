"""Throw-away Triton kernels for test_kernels.py: one that is fine, and one that spills."""

import torch
import triton
import triton.language as tl

from bertfast.ops.aot import Case


@triton.jit
def centre_kernel(x_ptr, y_ptr, N: tl.constexpr):
    cols = tl.arange(0, N)
    x = tl.load(x_ptr + cols)
    tl.store(y_ptr + cols, x - tl.sum(x, axis=0) / N)


def call_launchers():
    # 16384 floats in one warp are 512 for a thread, which has 255 registers.
    for width in (1024, 16384):
        centre_kernel[(1,)](torch.empty(width), torch.empty(width), N=width, num_warps=1)


def triton_case(launch):
    width = launch.values["N"]
    label = "small" if width == 1024 else "spilling"
    return Case(label, "float32", launch.threads, elements=width / launch.threads)
