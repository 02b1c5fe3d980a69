"""Adds up what a backward's programs left of a parameter's gradient: the last step of several ops.

The partial sums are rows of float32, one from each program, and are added in a fixed order: no
atomics, the same bits each run.
"""

import torch
import triton
import triton.language as tl

from .pointers import dense
from .triton_launch import Launch
from .triton_lib import round_to

# Programs of 16 columns, so that BERT's widths give every multiprocessor one. A thread has 8 loads
# of 16 bytes under way: all of 256 partial sums, which layer_norm's backward leaves of 32 K rows.
BLOCK_P = 256
BLOCK_N = 16
NUM_WARPS = 4


@triton.jit(do_not_specialize=["n_partials"])
def column_sum_kernel(
    partial_ptr,  # (sums, n_partials, N) float32
    out0_ptr,
    out1_ptr,
    out2_ptr,
    N,
    n_partials,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the partial sums of up to three parameters, program (i, j) columns i of sum j."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    rows = tl.arange(0, BLOCK_P)
    base = partial_ptr + which.to(tl.int64) * n_partials * N
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    lost = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first in range(0, n_partials, BLOCK_P):
        row = first + rows[:, None]
        inside = (row < n_partials) & (cols < N)[None, :]
        value = tl.load(base + row.to(tl.int64) * N + cols[None, :], mask=inside, other=0.0)
        # Kahan's compensation: the error does not grow with the number of rows.
        value -= lost
        sum_ = total + value
        lost = (sum_ - total) - value
        total = sum_
    result = tl.sum(total, axis=0)
    if which == 0:
        out_ptr = out0_ptr
    elif which == 1:
        out_ptr = out1_ptr
    else:
        out_ptr = out2_ptr
    tl.store(out_ptr + cols, round_to(result, out_ptr.dtype.element_ty), mask=cols < N)


_launch = Launch(column_sum_kernel)


def column_sums(partial: torch.Tensor, outs: list[torch.Tensor]) -> None:
    """Fills outs, one to three tensors of one dtype, from partial (len(outs), programs, width)."""
    sums, programs, width = partial.shape
    _launch(
        (-(-width // BLOCK_N), sums),
        (dense(partial), dense(outs[0]), dense(outs[min(1, sums - 1)]), dense(outs[-1])),
        (width,),
        (programs,),
        (BLOCK_P, BLOCK_N),
        NUM_WARPS,
    )
