"""Products with an activation by tensor descriptors, which copy whole tiles: from Hopper on.

    y = gelu(u + bias), u = x weight^T          a = x (M, K), b = weight (N, K)
    dv = (dy weight) * gelu'(u + bias)          a = dy (M, K), b = weight (K, N)

and, of a gated activation, whose halves have N columns each (HALVES = 2, else 1),

    y = act(g) * v, [g, v] = u + bias, u = x weight^T       b = weight (2, N, K)
    dv = (dy weight) * [v * act'(g), act(g)]                b = weight (K, N)

where u and dv are (M, 2, N), so that what lies beyond a half's columns isn't the other half.

Saved, shapes and bytes: triton.py. What a descriptor loads beyond a matrix is 0, what it stores
there is dropped. A program makes one tile of the output, or walks over the tiles (WALK): every
`programs`th from its number on. Operands are copied STAGES - 1 steps of BLOCK_K ahead.
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
NUMBERS = ["M", "N_8", "K_8", "programs"]


@triton.jit
def product_tile(
    a_desc,
    b_desc,
    K,
    first_row,
    first_col,
    B_ROWS: tl.constexpr,  # b is (N, K), or (2, N, K) where HALVES is 2
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    acc = tl.zeros((BLOCK_M, HALVES * BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        a = a_desc.load([first_row, k])
        if HALVES == 2:
            b = b_desc.load([0, first_col, k]).reshape(2 * BLOCK_N, BLOCK_K).T
        elif B_ROWS:
            b = b_desc.load([first_col, k]).T
        else:
            b = b_desc.load([k, first_col])
        acc = add_product(a, b, acc)
    return acc


@triton.jit
def forward_tile(
    tile,
    a_desc,
    b_desc,
    y_desc,
    u_desc,
    bias_ptr,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    # 1. the products
    row_tile, column_tile = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
    row, first_col = row_tile * BLOCK_M, column_tile * BLOCK_N
    acc = product_tile(
        *(a_desc, b_desc, K, row, first_col, True, HALVES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    )

    # 2. u, and y of what it was rounded to
    COLS: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        col = first_col + part * COLS
        if HALVES == 2:
            g = round_to(part_of(acc, part, 2 * PARTS), y_desc.dtype)
            v = round_to(part_of(acc, PARTS + part, 2 * PARTS), y_desc.dtype)
            if u_desc is not None:
                u_desc.store([row, 0, col], g[:, None, :])
                u_desc.store([row, 1, col], v[:, None, :])
            y = gated_activation(g, v, bias_ptr, col, N, ACTIVATION)
        else:
            u = round_to(part_of(acc, part, PARTS), y_desc.dtype)
            if u_desc is not None:
                u_desc.store([row, col], u)
            y = activation(u, bias_ptr, col, N, ACTIVATION)
        y_desc.store([row, col], round_to(y, y_desc.dtype))


@triton.jit(do_not_specialize=NUMBERS)
def linear_act_tma_kernel(
    a_desc,  # (M, K) by BLOCK_M x BLOCK_K
    b_desc,  # (N, K) by BLOCK_N x BLOCK_K; where HALVES is 2 (2, N, K) by 2 x BLOCK_N x BLOCK_K
    y_desc,  # (M, N) by BLOCK_M x (BLOCK_N / PARTS)
    u_desc,  # likewise, or (M, 2, N) by BLOCK_M x 1 x (BLOCK_N / PARTS); None: not wanted
    bias_ptr,  # HALVES N, or None
    M,
    N_8,
    K_8,
    programs,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    WALK: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    N, K = N_8 * 8, K_8 * 8
    if WALK:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, programs, warp_specialize=SPECIALIZE):
            forward_tile(
                *(tile, a_desc, b_desc, y_desc, u_desc, bias_ptr, M, N, K),
                *(ACTIVATION, HALVES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS),
            )
    else:
        forward_tile(
            *(tl.program_id(0), a_desc, b_desc, y_desc, u_desc, bias_ptr, M, N, K),
            *(ACTIVATION, HALVES, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS),
        )


@triton.jit
def backward_tile(
    tile,
    a_desc,
    b_desc,
    u_at,
    dv_at,
    bias_ptr,
    partial_ptr,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    OPERANDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    # 1. the products
    row_tile, column_tile = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
    row, first_col = row_tile * BLOCK_M, column_tile * BLOCK_N
    acc = product_tile(
        *(a_desc, b_desc, K, row, first_col, False, 1, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    )

    # 2. dv, and its share of the bias's gradient
    COLS: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        col = first_col + part * COLS
        if HALVES == 2:
            if OPERANDS:
                at, inside = places(row, col, M, N, 2 * N, BLOCK_M, COLS)
                g = tl.load(u_at + at, mask=inside, other=0.0)
                v = tl.load(u_at + at + N, mask=inside, other=0.0)
            else:
                g = u_at.load([row, 0, col]).reshape(BLOCK_M, COLS)
                v = u_at.load([row, 1, col]).reshape(BLOCK_M, COLS)
            dg, dv = gated_derivatives(
                *(part_of(acc, part, PARTS), g, v, bias_ptr, col, N, ACTIVATION)
            )
            if OPERANDS:
                tl.store(dv_at + at, round_to(dg, g.dtype), mask=inside)
                tl.store(dv_at + at + N, round_to(dv, g.dtype), mask=inside)
            else:
                dv_at.store([row, 0, col], round_to(dg, g.dtype)[:, None, :])
                dv_at.store([row, 1, col], round_to(dv, g.dtype)[:, None, :])
            if partial_ptr is not None:
                store_sums(dg, partial_ptr, row_tile, row, col, M, N, 2 * N)
                store_sums(dv, partial_ptr + N, row_tile, row, col, M, N, 2 * N)
        else:
            if OPERANDS:
                at, inside = places(row, col, M, N, N, BLOCK_M, COLS)
                u = tl.load(u_at + at, mask=inside, other=0.0)
            else:
                u = u_at.load([row, col])
            dv = derivative(part_of(acc, part, PARTS), u, bias_ptr, col, N, ACTIVATION)
            if OPERANDS:
                tl.store(dv_at + at, round_to(dv, u.dtype), mask=inside)
            else:
                dv_at.store([row, col], round_to(dv, u.dtype))
            if partial_ptr is not None:
                store_sums(dv, partial_ptr, row_tile, row, col, M, N, N)


@triton.jit(do_not_specialize=NUMBERS)
def linear_act_tma_backward_kernel(
    a_desc,  # (M, K) by BLOCK_M x BLOCK_K
    b_desc,  # (K, N) by BLOCK_K x BLOCK_N
    u_at,  # as u_desc above, or by its address
    dv_at,  # likewise
    bias_ptr,  # HALVES N, or None
    partial_ptr,  # (row tiles, HALVES N) float32; None: not wanted
    M,
    N_8,
    K_8,
    programs,
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
    OPERANDS: tl.constexpr,  # descriptors of a and b alone
    WALK: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    N, K = N_8 * 8, K_8 * 8
    if WALK:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, programs, warp_specialize=SPECIALIZE):
            backward_tile(
                *(tile, a_desc, b_desc, u_at, dv_at, bias_ptr, partial_ptr, M, N, K),
                *(ACTIVATION, HALVES, OPERANDS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS),
            )
    else:
        backward_tile(
            *(tl.program_id(0), a_desc, b_desc, u_at, dv_at, bias_ptr, partial_ptr, M, N, K),
            *(ACTIVATION, HALVES, OPERANDS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS),
        )
