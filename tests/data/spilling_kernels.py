"""Throw-away Triton kernels for test_kernels.py: one that is fine, and one that spills."""

import triton
import triton.language as tl

from bertfast.ops.aot import Case, TritonCase


@triton.jit
def centre_kernel(x_ptr, y_ptr, N: tl.constexpr):
    cols = tl.arange(0, N)
    x = tl.load(x_ptr + cols)
    tl.store(y_ptr + cols, x - tl.sum(x, axis=0) / N)


def triton_cases():
    # 16384 floats in one warp are 512 for a thread, which has 255 registers.
    for width, label in ((1024, "small"), (16384, "spilling")):
        case = Case(label, "float32", threads=32, elements=width / 32)
        arguments = {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16", "N": width}
        yield TritonCase(centre_kernel, arguments, 1, case)
