"""The first kernel of attention's backward: dq, and delta for the second (triton_bwd_dkv.py).

With p computed again from lse, z the dropout's factor of each score (0 or keep_scale), drawn again,
and < > the sum over a row's keys:
    dp = z * (dout v^T),  delta = <p dp> = <dout * out over a head>
    ds = p * (dp - delta),  dq = scale * ds k
keep_scale is taken out: everything is computed without it and multiplied at the end, with
delta / keep_scale in delta's place.

One program a tile of queries runs over the keys. It sums delta as dout times out, which is <p dp>
in another order, since it has not all of p when it needs it. No atomics: dq is written by one
program, in a fixed order. As in the forward a shared tile with a sum that isn't finite is done
again, sequence by sequence.
Moves 6 values per element of q and more: dout, out, q; k and v for each tile; dq.
"""

import triton
import triton.language as tl

from ..triton_lib import round_to, to_float
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
from .triton_dropout import keep_each, keep_tile
from .triton_scores import bias_log2, in_window, positions, rotated_back


@triton.jit
def _dq_tile(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    out_batch,
    out_token,
    out_head,
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
    batch,  # where the tile lies, and low, high and solid: which keys count
    head,
    first,
    start,
    length,
    many,
    low,
    high,
    solid,
    begin,  # WINDOW: the positions of the sequence to do
    end,
    zero,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TF32: tl.constexpr,
    STAGES: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Does the tile, or of a shared one a sequence; says whether all its sums are finite."""
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    # 1. the queries' rows, and delta
    token = wide(start)
    batch64 = wide(batch)
    head64 = wide(head)
    columns = tl.arange(0, BLOCK_D) + zero
    tile_rows = tl.arange(0, BLOCK_M) + zero
    tile_keys = tl.arange(0, BLOCK_N) + zero
    rows = first + tile_rows
    row_inside = (rows >= 0) & (rows < length)
    if WINDOW:
        row_inside = (rows >= begin) & (rows < end)
    q_ptr += batch64 * q_batch + (token + first) * q_token + head64 * q_head
    dout_ptr += batch64 * dout_batch + (token + first) * dout_token + head64 * dout_head
    out_ptr += batch64 * out_batch + (token + first) * out_token + head64 * out_head
    statistics = batch64 * lse_batch + head64 * lse_head + token
    dout_offsets = tile_rows[:, None] * dout_token + columns[None, :]
    out_offsets = tile_rows[:, None] * out_token + columns[None, :]
    q_offsets = tile_rows[:, None] * q_token + columns[None, :]
    dout = load_tile(dout_ptr, dout_offsets, row_inside, columns, D, BLOCK_D, True)
    out = load_tile(out_ptr, out_offsets, row_inside, columns, D, BLOCK_D, True)
    delta = tl.sum(to_float(dout) * to_float(out), axis=1)
    if seed_ptr is not None:
        delta = delta * ((65536 - threshold) * (1.0 / 65536))
    tl.store(delta_ptr + statistics + rows, delta, mask=row_inside)
    dout = operand(dout)
    q = operand(load_tile(q_ptr, q_offsets, row_inside, columns, D, BLOCK_D, True))
    lse = tl.load(lse_ptr + statistics + rows, mask=row_inside, other=float("inf"))
    k_ptr += batch64 * k_batch + token * k_token + head64 * k_head
    v_ptr += batch64 * v_batch + token * v_token + head64 * v_head
    k_offsets = tile_keys[:, None] * k_token + columns[None, :]
    v_offsets = tile_keys[:, None] * v_token + columns[None, :]
    if tiles_ptr is not None:
        row_which, row_origin = segments(cu_ptr, batch, start, many, rows)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # 2. over the keys: as in the forward, blocks in which every key counts, then the rest
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    FLOAT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    ALL_CHECKED: tl.constexpr = FLOAT or LEFT is not None
    STEPS: tl.constexpr = (BLOCK_N, BLOCK_N if ALL_CHECKED else BLOCK_T)
    full = low
    if not ALL_CHECKED:
        full = low + (solid - low) // BLOCK_N * BLOCK_N
        if tiles_ptr is not None:
            full = tl.where(many > 1, 0, full)
    if LEFT is not None:
        full = low + tl.maximum(first - LEFT - low, 0) // BLOCK_N * BLOCK_N
        high = tl.minimum(high, first + BLOCK_M + RIGHT)
    for CHECK in tl.static_range(1 if ALL_CHECKED or WINDOW else 0, 2):
        from_key = full if CHECK else low
        to_key = high if CHECK else full
        tile_keys = tl.arange(0, STEPS[CHECK]) + zero
        k_offsets = tile_keys[:, None] * k_token + columns[None, :]
        v_offsets = tile_keys[:, None] * v_token + columns[None, :]
        for block in tl.range(0, tl.cdiv(to_key - from_key, STEPS[CHECK]), num_stages=STAGES):
            j0 = from_key + block * STEPS[CHECK]
            keys = j0 + tile_keys
            on = keys < high
            if WINDOW:
                on = (keys >= begin) & (keys < end)
            if CHECK and mask_ptr is not None:
                on = on & (tl.load(mask_ptr + keys, mask=on, other=0) != 0)
            k_block = k_ptr + wide(j0) * k_token
            v_block = v_ptr + wide(j0) * v_token
            k = operand(load_tile(k_block, k_offsets, on, columns, D, BLOCK_D, CHECK))
            v = load_tile(v_block, v_offsets, on, columns, D, BLOCK_D, CHECK)
            scores = product(q, k, PRECISION)
            if bias_ptr is None:
                p = tl.exp2(scores * scale_log2 - lse[:, None])
            else:
                scores = scores * scale_log2 + bias_log2(bias_ptr, bias_head, head, rows, keys)
                p = tl.exp2(scores - lse[:, None])
            dp = product(dout, operand(v), PRECISION)
            key_which = tl.zeros_like(keys)
            key_origin = tl.zeros_like(keys)
            if CHECK:
                p = tl.where(on[None, :], p, 0.0)
                if tiles_ptr is not None:
                    if many > 1:
                        key_which, key_origin = segments(cu_ptr, batch, start, many, keys)
                        p = tl.where(row_which[:, None] == key_which[None, :], p, 0.0)
                if LEFT is not None:
                    p = tl.where(in_window(rows, keys, LEFT, RIGHT), p, 0.0)
            if seed_ptr is not None:
                if CHECK and tiles_ptr is not None:
                    if many > 1:
                        keep = keep_each(
                            *(seed, ((batch + row_which) * heads + head)[:, None]),
                            *((rows - row_origin)[:, None], (keys - key_origin)[None, :]),
                            *(site, threshold),
                        )
                    else:
                        keep = keep_tile(
                            *(seed, batch * heads + head, first, j0),
                            *(site, threshold, BLOCK_M, STEPS[CHECK]),
                        )
                else:
                    keep = keep_tile(
                        *(seed, batch * heads + head, first - low, j0 - low),
                        *(site, threshold, BLOCK_M, STEPS[CHECK]),
                    )
                dp = tl.where(keep, dp, 0.0)
            ds = operand(round_to(p * (dp - delta[:, None]), k_ptr.dtype.element_ty))
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)

    # 3. scale and write
    finite = all_finite(dq)
    dq_ptr += batch64 * dq_batch + (token + first) * dq_token + head64 * dq_head
    dq = dq * (scale * keep_scale)
    if cos_ptr is not None:
        position = positions(cu_ptr, tiles_ptr, batch, start, many, rows)
        dq = rotated_back(dq, position, row_inside, cos_ptr, sin_ptr, D)
    dq = round_to(dq, dq_ptr.dtype.element_ty)
    dq_offsets = tile_rows[:, None] * dq_token + columns[None, :]
    store_tile(dq_ptr, dq_offsets, dq, row_inside, columns, D, BLOCK_D)
    return finite


@triton.jit(do_not_specialize=VARYING)
def attention_bwd_dq_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,  # written
    dq_ptr,
    mask_ptr,  # one byte a key, 0 = masked; or None
    cu_ptr,  # first token of each sequence, or None: padded
    tiles_ptr,  # the plan's list, or None
    seed_ptr,  # one int64, or None without dropout
    cos_ptr,  # rotary positions' tables, where q and k are rotated; or None
    sin_ptr,
    bias_ptr,  # (heads, 2 * reach + 1), or None
    dout_batch,  # strides in elements: from sequence to sequence (0 if packed), token, head
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
    out_batch,
    out_token,
    out_head,
    dq_batch,
    dq_token,
    dq_head,
    bias_head,  # 1 without a bias
    mask_batch,
    lse_batch,
    lse_head,
    heads,
    n_tiles,
    length,  # of a padded sequence
    scale: tl.float32,
    scale_log2: tl.float32,  # scale * log2 e, the very number that the forward had
    site,
    threshold,
    keep_scale: tl.float32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,  # queries in a step where not all are inside
    PARTS: tl.constexpr,  # programs for a plan's tile
    TF32: tl.constexpr,
    STAGES: tl.constexpr,
    LEFT: tl.constexpr,  # keys to the sides that a query sees, or None: all
    RIGHT: tl.constexpr,
):
    # 1. where this tile lies; low and high bound the keys that count
    batch, head, first, start, length, many = find_tile(
        cu_ptr, tiles_ptr, heads, n_tiles, length, BLOCK_M, PARTS
    )
    low = 0
    high = length
    solid = length
    if mask_ptr is not None:
        mask_ptr += wide(batch) * mask_batch
        low, high, solid = attended(mask_ptr, length)
        if seed_ptr is not None:
            first -= (BLOCK_M - low % BLOCK_M) % BLOCK_M  # as in the forward
    if first >= length:
        return

    # 2. the tile, and once more what another's NaN has spoilt
    finite = _dq_tile(
        *(dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, mask_ptr, cu_ptr),
        *(tiles_ptr, seed_ptr, cos_ptr, sin_ptr, bias_ptr),
        *(dout_batch, dout_token, dout_head, q_batch, q_token, q_head),
        *(k_batch, k_token, k_head, v_batch, v_token, v_head, out_batch, out_token, out_head),
        *(dq_batch, dq_token, dq_head, bias_head),
        *(lse_batch, lse_head, heads, scale, scale_log2, site),
        *(threshold, keep_scale, batch, head, first, start, length, many, low, high, solid),
        *(0, 0, 0, D, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_T, TF32, STAGES, LEFT, RIGHT),
        WINDOW=False,
    )
    if tiles_ptr is not None:
        if (many > 1) & (finite == 0):
            zero = zero_unknown_to_the_compiler(tiles_ptr)
            for index in range(0, many):
                begin = tl.load(cu_ptr + batch + index) - start
                end = tl.load(cu_ptr + batch + index + 1) - start
                _dq_tile(
                    *(dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, mask_ptr),
                    *(cu_ptr, tiles_ptr, seed_ptr, cos_ptr, sin_ptr, bias_ptr),
                    *(dout_batch, dout_token, dout_head, q_batch),
                    *(q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head),
                    *(out_batch, out_token, out_head, dq_batch, dq_token, dq_head, bias_head),
                    *(
                        lse_batch,
                        lse_head,
                        heads,
                        scale,
                        scale_log2,
                        site,
                        threshold,
                        keep_scale,
                        batch,
                        head,
                    ),
                    *(first, start, length, many, low, high, solid),
                    *(begin, end, zero, D, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_T, TF32, STAGES),
                    *(LEFT, RIGHT),
                    WINDOW=True,
                )
