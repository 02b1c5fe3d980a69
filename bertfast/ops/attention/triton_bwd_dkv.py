"""dk and dv of attention's backward, the second kernel; or all of it, where it is the only one.

    dv = (z p)^T dout,  dk = scale * ds^T q,  with p, z and ds as in triton_bwd_dq.py

One program a tile of keys holds their dk and dv in registers and runs over the queries. Where one
tile holds all keys of its sequence, a program has all that dq is made of, so it makes that too
(WHOLE), with delta summed as <p dp>, and the first kernel isn't needed; where it holds all queries
too there is no loop (SINGLE).
Scores are computed with queries as rows here too, and p and ds are transposed as operands: so the
dropout's draws lie as the threads hold them.
No atomics: every gradient is written by one program, in a fixed order. As in the forward a shared
tile with a sum that isn't finite is done again, sequence by sequence.
Moves 7 values per element of q for WHOLE (q, k, v, dout read; dq, dk, dv written), else 6 and more:
k, v; q and dout for each tile; dk, dv.
"""

import triton
import triton.language as tl

from ..triton_lib import round_to
from .triton_core import (
    VARYING,
    all_finite,
    attended,
    find_tile,
    load_tile,
    operand,
    product,
    segments,
    store_tile,
    wide,
    zero_unknown_to_the_compiler,
)
from .triton_dropout import keep_each, keep_rows, keep_tile
from .triton_scores import bias_log2, in_window, positions, rotated_back


@triton.jit
def _dkv_tile(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    mask_ptr,
    cu_ptr,
    tiles_ptr,
    seed_ptr,
    cos_ptr,
    sin_ptr,
    bias_ptr,
    dout_batch,
    dout_token,
    dout_head,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    dq_batch,
    dq_token,
    dq_head,
    bias_head,
    lse_batch,
    lse_head,
    heads,
    scale,
    scale_log2,
    site,
    threshold,
    keep_scale,
    batch,  # where the tile lies, and low and high: which keys count
    head,
    j0,
    start,
    length,
    many,
    low,
    high,
    i_first,
    begin,  # WINDOW: the positions of the sequence to do
    end,
    zero,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TF32: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    SINGLE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Does the tile, or of a shared one a sequence; says whether all its sums are finite."""
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    # 1. the keys and values
    token = wide(start)
    batch64 = wide(batch)
    head64 = wide(head)
    columns = tl.arange(0, BLOCK_D) + zero
    tile_rows = tl.arange(0, BLOCK_M) + zero
    tile_keys = tl.arange(0, BLOCK_N) + zero
    keys = j0 + tile_keys
    key_inside = (keys >= 0) & (keys < length)
    on = (keys >= low) & (keys < high)
    if WINDOW:
        key_inside = (keys >= begin) & (keys < end)
        on = key_inside
    if mask_ptr is not None:
        on = on & (tl.load(mask_ptr + keys, mask=on, other=0) != 0)
    k_ptr += batch64 * k_batch + (token + j0) * k_token + head64 * k_head
    v_ptr += batch64 * v_batch + (token + j0) * v_token + head64 * v_head
    k_offsets = tile_keys[:, None] * k_token + columns[None, :]
    v_offsets = tile_keys[:, None] * v_token + columns[None, :]
    k = operand(load_tile(k_ptr, k_offsets, on, columns, D, BLOCK_D, True))
    v = operand(load_tile(v_ptr, v_offsets, on, columns, D, BLOCK_D, True))
    q_ptr += batch64 * q_batch + token * q_token + head64 * q_head
    dout_ptr += batch64 * dout_batch + token * dout_token + head64 * dout_head
    statistics = batch64 * lse_batch + head64 * lse_head + token
    q_offsets = tile_rows[:, None] * q_token + columns[None, :]
    dout_offsets = tile_rows[:, None] * dout_token + columns[None, :]
    grad = batch64 * dq_batch + head64 * dq_head
    dq_offsets = tile_rows[:, None] * dq_token + columns[None, :]
    if tiles_ptr is not None:
        key_which, key_origin = segments(cu_ptr, batch, start, many, keys)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # 2. over the queries; for WHOLE also if no key counts, as dq is to be written. Tiles of several
    # sequences have a loop of their own, which keeps their tests out of the other.
    i_end = length
    if not WHOLE:
        i_end = tl.where((j0 < high) & (j0 + BLOCK_N > low), length, i_first)
        if LEFT is not None:
            i_end = tl.minimum(i_end, j0 + BLOCK_N + LEFT)
            i_first += tl.maximum(j0 - RIGHT - i_first, 0) // BLOCK_M * BLOCK_M
    n_steps = tl.cdiv(i_end - i_first, BLOCK_M)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    TWO_LOOPS: tl.constexpr = tiles_ptr is not None and not WHOLE
    FIRST_LOOP: tl.constexpr = 1 if TWO_LOOPS and WINDOW else 0
    finite = 1
    for SHARED in tl.static_range(FIRST_LOOP, 2 if TWO_LOOPS else 1):
        if TWO_LOOPS:
            if LEFT is None:
                n_steps = tl.where((many > 1) == (SHARED == 1), tl.cdiv(length, BLOCK_M), 0)
            else:
                n_steps = tl.where((many > 1) == (SHARED == 1), i_end - i_first, 0)
                n_steps = tl.cdiv(n_steps, BLOCK_M)
        for block in tl.range(0, 1 if SINGLE else n_steps, num_stages=STAGES):
            i0 = i_first + block * BLOCK_M
            rows = i0 + tile_rows
            inside = (rows >= 0) & (rows < length)
            if WINDOW:
                inside = (rows >= begin) & (rows < end)
            step = wide(i0)
            q_block = q_ptr + step * q_token
            dout_block = dout_ptr + step * dout_token
            counts = inside
            if WHOLE and mask_ptr is not None:
                counts = inside & (low < high)  # as in the forward
            q = operand(load_tile(q_block, q_offsets, counts, columns, D, BLOCK_D, True))
            dout = load_tile(dout_block, dout_offsets, counts, columns, D, BLOCK_D, True)
            dout = operand(dout)
            # exp2(score - inf) = 0 for what is outside
            lse = tl.load(lse_ptr + statistics + rows, mask=inside, other=float("inf"))
            scores = product(q, k, PRECISION)
            if bias_ptr is None:
                p = tl.exp2(scores * scale_log2 - lse[:, None])
            else:
                scores = scores * scale_log2 + bias_log2(bias_ptr, bias_head, head, rows, keys)
                p = tl.exp2(scores - lse[:, None])
            if LEFT is not None:
                p = tl.where(in_window(rows, keys, LEFT, RIGHT), p, 0.0)
            if WHOLE:
                # A masked key spoils only its own rows of dk and dv, which are zeroed in the end;
                # but dq is a sum over keys.
                p = tl.where(on[None, :], p, 0.0)
            dp = product(dout, v, PRECISION)
            row_which = tl.zeros_like(rows)
            row_origin = tl.zeros_like(rows)
            if tiles_ptr is not None and (SHARED or WHOLE):
                if (SHARED == 1) | (many > 1):
                    row_which, row_origin = segments(cu_ptr, batch, start, many, rows)
                    p = tl.where(row_which[:, None] == key_which[None, :], p, 0.0)
            dropped = p
            if seed_ptr is not None:
                if tiles_ptr is not None and (SHARED or WHOLE):
                    if (SHARED == 1) | (many > 1):
                        keep = keep_each(
                            *(seed, ((batch + row_which) * heads + head)[:, None]),
                            *((rows - row_origin)[:, None], (keys - key_origin)[None, :]),
                            *(site, threshold),
                        )
                    else:
                        keep = keep_tile(
                            *(seed, batch * heads + head, i0, j0),
                            *(site, threshold, BLOCK_M, BLOCK_N),
                        )
                elif SINGLE and mask_ptr is not None:
                    if low % 16 == 0:
                        keep = keep_tile(
                            *(seed, batch * heads + head, i0 - low, j0 - low),
                            *(site, threshold, BLOCK_M, BLOCK_N),
                        )
                    else:
                        keep = keep_rows(
                            *(seed, batch * heads + head, i0 - low, j0 - low),
                            *(site, threshold, BLOCK_M, BLOCK_N),
                        )
                else:
                    keep = keep_tile(
                        *(seed, batch * heads + head, i0 - low, j0 - low),
                        *(site, threshold, BLOCK_M, BLOCK_N),
                    )
                dropped = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp, 0.0)
            dropped = operand(round_to(dropped, k_ptr.dtype.element_ty))
            dv = tl.dot(tl.trans(dropped), dout, dv, input_precision=PRECISION)
            if WHOLE:
                delta = tl.sum(p * dp, axis=1)
            else:
                delta = tl.load(delta_ptr + statistics + rows, mask=inside, other=0.0)
            ds = operand(round_to(p * (dp - delta[:, None]), k_ptr.dtype.element_ty))
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
            if WHOLE:
                dq = tl.dot(ds, k, input_precision=PRECISION) * (scale * keep_scale)
                if tiles_ptr is not None and not WINDOW:
                    finite = finite & all_finite(dq)
                dq_base = dq_ptr + grad + (token + step) * dq_token
                if cos_ptr is not None:
                    position = positions(cu_ptr, tiles_ptr, batch, start, many, rows)
                    dq = rotated_back(dq, position, inside, cos_ptr, sin_ptr, D)
                dq = round_to(dq, dq_ptr.dtype.element_ty)
                store_tile(dq_base, dq_offsets, dq, inside, columns, D, BLOCK_D)

    # 3. scale and write; what isn't attended gets exact zeros
    finite = finite & all_finite(dk) & all_finite(dv)
    dk = tl.where(on[:, None], dk * (scale * keep_scale), 0.0)
    dv = tl.where(on[:, None], dv * keep_scale, 0.0)
    if WHOLE and mask_ptr is not None:  # the keys before the tile
        before = dk_ptr + grad + token * dq_token
        zeros = tl.zeros((BLOCK_N, BLOCK_D), dk_ptr.dtype.element_ty)
        offsets = tile_keys[:, None] * dq_token + columns[None, :]
        store_tile(before, offsets, zeros, tile_keys < low, columns, D, BLOCK_D)
        before = dv_ptr + grad + token * dq_token
        store_tile(before, offsets, zeros, tile_keys < low, columns, D, BLOCK_D)
    grad += (token + j0) * dq_token
    offsets = tile_keys[:, None] * dq_token + columns[None, :]
    if cos_ptr is not None:
        position = positions(cu_ptr, tiles_ptr, batch, start, many, keys)
        dk = rotated_back(dk, position, key_inside, cos_ptr, sin_ptr, D)
    dk = round_to(dk, dk_ptr.dtype.element_ty)
    dv = round_to(dv, dv_ptr.dtype.element_ty)
    store_tile(dk_ptr + grad, offsets, dk, key_inside, columns, D, BLOCK_D)
    store_tile(dv_ptr + grad, offsets, dv, key_inside, columns, D, BLOCK_D)
    return finite


@triton.jit(do_not_specialize=VARYING)
def attention_bwd_dkv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,  # read; None for WHOLE
    dq_ptr,  # WHOLE only
    dk_ptr,
    dv_ptr,
    mask_ptr,
    cu_ptr,
    tiles_ptr,
    seed_ptr,
    cos_ptr,
    sin_ptr,
    bias_ptr,
    dout_batch,
    dout_token,
    dout_head,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    dq_batch,  # dk and dv lie as dq does
    dq_token,
    dq_head,
    bias_head,  # 1 without a bias
    mask_batch,
    lse_batch,
    lse_head,
    heads,
    n_tiles,
    length,
    scale: tl.float32,
    scale_log2: tl.float32,  # scale * log2 e, the very number that the forward had
    site,
    threshold,
    keep_scale: tl.float32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,  # programs for a plan's tile
    TF32: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    SINGLE: tl.constexpr,
    LEFT: tl.constexpr,  # keys to the sides that a query sees, or None: all
    RIGHT: tl.constexpr,
):
    # 1. where this tile lies. low and high bound the keys that count; the queries start at i_first.
    batch, head, j0, start, length, many = find_tile(
        cu_ptr, tiles_ptr, heads, n_tiles, length, BLOCK_N, PARTS
    )
    low = 0
    high = length
    i_first = 0
    if mask_ptr is not None:
        mask_ptr += wide(batch) * mask_batch
        low, high, _ = attended(mask_ptr, length)
        if WHOLE:
            j0 = low  # so the tile holds all that count, wherever they start
        elif seed_ptr is not None:
            j0 -= (BLOCK_N - low % BLOCK_N) % BLOCK_N
        if seed_ptr is not None and not SINGLE:
            i_first = -((BLOCK_M - low % BLOCK_M) % BLOCK_M)
    if j0 >= length:
        return

    # 2. the tile, and once more what another's NaN has spoilt
    finite = _dkv_tile(
        *(dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, mask_ptr),
        *(cu_ptr, tiles_ptr, seed_ptr, cos_ptr, sin_ptr, bias_ptr),
        *(dout_batch, dout_token, dout_head, q_batch, q_token, q_head),
        *(k_batch, k_token, k_head, v_batch, v_token, v_head, dq_batch, dq_token, dq_head),
        *(bias_head,),
        *(lse_batch, lse_head, heads, scale, scale_log2, site, threshold, keep_scale, batch, head),
        *(j0, start, length, many, low, high, i_first),
        *(0, 0, 0, D, BLOCK_D, BLOCK_M, BLOCK_N, TF32, STAGES, WHOLE, SINGLE, LEFT, RIGHT),
        WINDOW=False,
    )
    if tiles_ptr is not None:
        if (many > 1) & (finite == 0):
            zero = zero_unknown_to_the_compiler(tiles_ptr)
            for index in range(0, many):
                begin = tl.load(cu_ptr + batch + index) - start
                end = tl.load(cu_ptr + batch + index + 1) - start
                _dkv_tile(
                    *(dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr),
                    *(mask_ptr, cu_ptr, tiles_ptr, seed_ptr, cos_ptr, sin_ptr, bias_ptr),
                    *(dout_batch, dout_token, dout_head),
                    *(q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head),
                    *(dq_batch, dq_token, dq_head, bias_head),
                    *(lse_batch, lse_head, heads, scale, scale_log2),
                    *(site, threshold, keep_scale, batch, head, j0, start, length, many, low, high),
                    *(i_first,),
                    *(begin, end, zero, D, BLOCK_D, BLOCK_M, BLOCK_N, TF32, STAGES, WHOLE, SINGLE),
                    *(LEFT, RIGHT),
                    WINDOW=True,
                )
