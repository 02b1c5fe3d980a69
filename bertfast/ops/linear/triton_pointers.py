"""Products with an activation by addresses, a tile a program: for GPUs without tensor descriptors.

    y = gelu(u + bias), u = x weight^T          a = x (M, K), b = weight (N, K)
    dv = (dy weight) * gelu'(u + bias)          a = dy (M, K), b = weight (K, N)

and, of a gated activation, whose halves have N columns each (HALVES = 2, else 1),

    y = act(g) * v, [g, v] = u + bias, u = x weight^T       b = weight (2 N, K)
    dv = (dy weight) * [v * act'(g), act(g)]                b = weight (K, N)

Saved, shapes and bytes: triton.py. A program makes BLOCK_M x BLOCK_N of y, or of dy weight, in
steps of BLOCK_K along K, which are copied to shared memory STAGES - 1 steps ahead.
"""

import triton
import triton.language as tl

from ..triton_lib import round_to
from .triton_tiles import (
    activation,
    add_product,
    derivative,
    gated_activation,
    gated_derivatives,
    part_of,
    places,
    store_sums,
    tile_at,
)

# One form serves all sizes: widths are multiples of 8 in any case.
NUMBERS = ["M", "N_8", "K_8", "a_stride_8", "b_stride_8"]


@triton.jit
def offsets(rows, stride_8):
    """Of rows, in elements: a product of 32 bits by 32 in 64, of which the compiler knows that it
    is a multiple of 8."""
    return rows.to(tl.int64) * stride_8 * 8


@triton.jit
def product_tile(
    a_ptr,
    b_ptr,
    M,
    N,
    K,
    a_stride_8,
    b_stride_8,
    first_row,
    first_col,
    B_ROWS: tl.constexpr,  # b is (N, K), or (2 N, K) where HALVES is 2
    HALVES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Rows and columns outside load others, inside: so the loop needs no masks for them.
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), M - 1)
    cols = tl.arange(0, HALVES * BLOCK_N)
    if HALVES == 2:  # the same columns of both
        within = cols % BLOCK_N
        within = tl.where(within < N - first_col, within, within % 8)
        cols = within + cols // BLOCK_N * N
    else:
        cols = tl.where(cols < N - first_col, cols, cols % 8)
    ks = tl.arange(0, BLOCK_K)
    a_at = a_ptr + offsets(rows, a_stride_8)[:, None] + ks[None, :]
    if B_ROWS:
        b_at = b_ptr + offsets(first_col + cols, b_stride_8)[None, :] + ks[:, None]
        step = BLOCK_K
    else:
        cols = tl.max_contiguous(tl.multiple_of(cols, 8), 8)
        b_at = b_ptr + first_col + cols[None, :] + offsets(ks, b_stride_8)[:, None]
        step = b_stride_8.to(tl.int64) * (8 * BLOCK_K)
    acc = tl.zeros((BLOCK_M, HALVES * BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            a, b = tl.load(a_at), tl.load(b_at)
        else:  # zeros for both: beyond a row's end there may be anything
            a = tl.load(a_at, mask=ks[None, :] < K - k, other=0.0)
            b = tl.load(b_at, mask=ks[:, None] < K - k, other=0.0)
        acc = add_product(a, b, acc)
        a_at += BLOCK_K
        b_at += step
    return acc


@triton.jit(do_not_specialize=NUMBERS)
def linear_act_kernel(
    a_ptr,  # (M, K), rows apart
    b_ptr,  # (HALVES N, K), rows apart
    bias_ptr,  # HALVES N, or None
    y_ptr,  # (M, N)
    u_ptr,  # (M, HALVES N); None: not wanted
    M,
    N_8,
    K_8,
    a_stride_8,
    b_stride_8,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    # 1. the tile
    N, K = N_8 * 8, K_8 * 8
    row_tile, column_tile = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    first_row, first_col = row_tile * BLOCK_M, column_tile * BLOCK_N

    # 2. the products
    acc = product_tile(
        *(a_ptr, b_ptr, M, N, K, a_stride_8, b_stride_8, first_row, first_col),
        *(True, HALVES, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES),
    )

    # 3. u, and y of what it was rounded to
    COLS: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        col = first_col + part * COLS
        at, inside = places(first_row, col, M, N, N, BLOCK_M, COLS)
        if HALVES == 2:
            g = round_to(part_of(acc, part, 2 * PARTS), y_ptr.dtype.element_ty)
            v = round_to(part_of(acc, PARTS + part, 2 * PARTS), y_ptr.dtype.element_ty)
            if u_ptr is not None:
                both, _ = places(first_row, col, M, N, 2 * N, BLOCK_M, COLS)
                tl.store(u_ptr + both, g, mask=inside)
                tl.store(u_ptr + both + N, v, mask=inside)
            y = gated_activation(g, v, bias_ptr, col, N, ACTIVATION)
        else:
            u = round_to(part_of(acc, part, PARTS), y_ptr.dtype.element_ty)
            if u_ptr is not None:
                tl.store(u_ptr + at, u, mask=inside)
            y = activation(u, bias_ptr, col, N, ACTIVATION)
        tl.store(y_ptr + at, round_to(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def linear_act_backward_kernel(
    a_ptr,  # (M, K), rows apart
    b_ptr,  # (K, N), rows apart
    u_ptr,  # (M, HALVES N)
    bias_ptr,  # HALVES N, or None
    dv_ptr,  # (M, HALVES N)
    partial_ptr,  # (row tiles, HALVES N) float32; None: not wanted
    M,
    N_8,
    K_8,
    a_stride_8,
    b_stride_8,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    # 1. the tile
    N, K = N_8 * 8, K_8 * 8
    row_tile, column_tile = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    first_row, first_col = row_tile * BLOCK_M, column_tile * BLOCK_N

    # 2. the products
    acc = product_tile(
        *(a_ptr, b_ptr, M, N, K, a_stride_8, b_stride_8, first_row, first_col),
        *(False, 1, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES),
    )

    # 3. dv, and its share of the bias's gradient
    COLS: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        col = first_col + part * COLS
        at, inside = places(first_row, col, M, N, HALVES * N, BLOCK_M, COLS)
        if HALVES == 2:
            g = tl.load(u_ptr + at, mask=inside, other=0.0)
            v = tl.load(u_ptr + at + N, mask=inside, other=0.0)
            dg, dv = gated_derivatives(
                *(part_of(acc, part, PARTS), g, v, bias_ptr, col, N, ACTIVATION)
            )
            tl.store(dv_ptr + at, round_to(dg, dv_ptr.dtype.element_ty), mask=inside)
            tl.store(dv_ptr + at + N, round_to(dv, dv_ptr.dtype.element_ty), mask=inside)
            if partial_ptr is not None:
                store_sums(dg, partial_ptr, row_tile, first_row, col, M, N, 2 * N)
                store_sums(dv, partial_ptr + N, row_tile, first_row, col, M, N, 2 * N)
        else:
            u = tl.load(u_ptr + at, mask=inside, other=0.0)
            dv = derivative(part_of(acc, part, PARTS), u, bias_ptr, col, N, ACTIVATION)
            tl.store(dv_ptr + at, round_to(dv, dv_ptr.dtype.element_ty), mask=inside)
            if partial_ptr is not None:
                store_sums(dv, partial_ptr, row_tile, first_row, col, M, N, N)
