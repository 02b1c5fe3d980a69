"""The smallest kernel: whether it compiles tells if Triton knows an architecture at all."""

import triton
import triton.language as tl


@triton.jit
def fill_kernel(out_ptr):
    tl.store(out_ptr + tl.program_id(0), 1.0)
