"""The gradients of attention, with p computed again from lse and drops drawn again.

With z the dropout's factor of each score (0 or keep_scale) and < > the sum over a row's keys:
    dv = (z p)^T dout,  dp = z * (dout v^T),  delta = <p dp>
    ds = p * (dp - delta),  dq = scale * ds k,  dk = scale * ds^T q

keep_scale is taken out: everything is computed without it and multiplied at the end, with
delta / keep_scale in delta's place.

Two kernels. attention_bwd_dq_kernel has one program a tile of queries and runs over the keys; it
also computes delta and leaves it for the other. attention_bwd_dkv_kernel has one program a tile of
keys, holds their dk and dv in registers and runs over the queries. Where one tile holds all keys of
its sequence, a program has all that dq is made of, so it makes that too (WHOLE) and the first
kernel isn't needed; where it holds all queries too there is no loop (SINGLE). delta is then summed
as written; in the first kernel, which has not all of p when it needs it, it is the same sum in
another order: dout times out, over a head.
Scores are computed with queries as rows in both, and p and ds are transposed as operands: so the
dropout's draws lie as the threads hold them.
No atomics: every gradient is written once, by one program, in a fixed order.
Moves 7 values an element of q for WHOLE (q, k, v, dout read; dq, dk, dv written), else the
first kernel 6 and more, the second 6 and more: each tile reads the other side again.
"""

import triton
import triton.language as tl

from ..triton_lib import round_to, to_float
from .triton_core import (
    attended,
    find_tile,
    load_tile,
    operand,
    product,
    segments,
    store_tile,
    wide,
)
from .triton_dropout import keep_each, keep_rows, keep_tile


@triton.jit(do_not_specialize=["site", "threshold", "length", "n_tiles"])
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
    mask_batch,
    lse_batch,
    lse_head,
    heads,
    n_tiles,
    length,  # of a padded sequence
    scale,
    scale_log2,  # scale * log2 e, the very number that the forward had
    site,
    threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,  # queries in a step where not all are inside
    PARTS: tl.constexpr,  # programs for a plan's tile
    TF32: tl.constexpr,
    STAGES: tl.constexpr,
):
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    # 1. where this tile lies; low and high bound the keys that count
    batch, head, first, start, length, many = find_tile(
        cu_ptr, tiles_ptr, heads, n_tiles, length, BLOCK_M, PARTS
    )
    low = 0
    high = length
    if mask_ptr is not None:
        mask_ptr += wide(batch) * mask_batch
        low, high = attended(mask_ptr, length)
        if seed_ptr is not None:
            first -= (BLOCK_M - low % BLOCK_M) % BLOCK_M  # as in the forward
    if first >= length:
        return

    # 2. the queries' rows, and delta
    token = wide(start)
    batch64 = wide(batch)
    head64 = wide(head)
    columns = tl.arange(0, BLOCK_D)
    tile_rows = tl.arange(0, BLOCK_M)
    tile_keys = tl.arange(0, BLOCK_N)
    rows = first + tile_rows
    row_inside = (rows >= 0) & (rows < length)
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

    # 3. over the keys: as in the forward, blocks in which every key counts, then the rest
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    FLOAT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    ALL_CHECKED: tl.constexpr = mask_ptr is not None or FLOAT
    STEPS: tl.constexpr = (BLOCK_N, BLOCK_N if ALL_CHECKED else BLOCK_T)
    full = low
    if not ALL_CHECKED:
        full = high // BLOCK_N * BLOCK_N
        if tiles_ptr is not None:
            full = tl.where(many > 1, 0, full)
    for CHECK in tl.static_range(1 if ALL_CHECKED else 0, 2):
        begin = full if CHECK else low
        end = high if CHECK else full
        tile_keys = tl.arange(0, STEPS[CHECK])
        k_offsets = tile_keys[:, None] * k_token + columns[None, :]
        v_offsets = tile_keys[:, None] * v_token + columns[None, :]
        for block in tl.range(0, tl.cdiv(end - begin, STEPS[CHECK]), num_stages=STAGES):
            j0 = begin + block * STEPS[CHECK]
            keys = j0 + tile_keys
            on = keys < high
            if mask_ptr is not None:
                on = on & (tl.load(mask_ptr + keys, mask=on, other=0) != 0)
            k_block = k_ptr + wide(j0) * k_token
            v_block = v_ptr + wide(j0) * v_token
            k = operand(load_tile(k_block, k_offsets, on, columns, D, BLOCK_D, CHECK))
            v = load_tile(v_block, v_offsets, on, columns, D, BLOCK_D, CHECK)
            scores = product(q, k, PRECISION)
            p = tl.exp2(scores * scale_log2 - lse[:, None])
            dp = product(dout, operand(v), PRECISION)
            key_which = tl.zeros_like(keys)
            key_origin = tl.zeros_like(keys)
            if CHECK:
                p = tl.where(on[None, :], p, 0.0)
                if tiles_ptr is not None:
                    if many > 1:
                        key_which, key_origin = segments(cu_ptr, batch, start, many, keys)
                        p = tl.where(row_which[:, None] == key_which[None, :], p, 0.0)
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

    # 4. scale and write
    dq_ptr += batch64 * dq_batch + (token + first) * dq_token + head64 * dq_head
    dq = round_to(dq * (scale * keep_scale), dq_ptr.dtype.element_ty)
    dq_offsets = tile_rows[:, None] * dq_token + columns[None, :]
    store_tile(dq_ptr, dq_offsets, dq, row_inside, columns, D, BLOCK_D)


@triton.jit(do_not_specialize=["site", "threshold", "length", "n_tiles"])
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
    mask_batch,
    lse_batch,
    lse_head,
    heads,
    n_tiles,
    length,
    scale,
    scale_log2,  # scale * log2 e, the very number that the forward had
    site,
    threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,  # programs for a plan's tile
    TF32: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    SINGLE: tl.constexpr,
):
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    # 1. where this tile lies. low and high bound the keys that count; the queries start at i_first.
    batch, head, j0, start, length, many = find_tile(
        cu_ptr, tiles_ptr, heads, n_tiles, length, BLOCK_N, PARTS
    )
    low = 0
    high = length
    i_first = 0
    if mask_ptr is not None:
        mask_ptr += wide(batch) * mask_batch
        low, high = attended(mask_ptr, length)
        if WHOLE:
            j0 = low  # so the tile holds all that count, wherever they start
        elif seed_ptr is not None:
            j0 -= (BLOCK_N - low % BLOCK_N) % BLOCK_N
        if seed_ptr is not None and not SINGLE:
            i_first = -((BLOCK_M - low % BLOCK_M) % BLOCK_M)
    if j0 >= length:
        return

    # 2. the keys and values
    token = wide(start)
    batch64 = wide(batch)
    head64 = wide(head)
    columns = tl.arange(0, BLOCK_D)
    tile_rows = tl.arange(0, BLOCK_M)
    tile_keys = tl.arange(0, BLOCK_N)
    keys = j0 + tile_keys
    key_inside = (keys >= 0) & (keys < length)
    on = (keys >= low) & (keys < high)
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

    # 3. over the queries; for WHOLE also if no key counts, as dq is to be written. Tiles of several
    # sequences have a loop of their own, which keeps their tests out of the other.
    i_end = length
    if not WHOLE:
        i_end = tl.where((j0 < high) & (j0 + BLOCK_N > low), length, i_first)
    n_steps = tl.cdiv(i_end - i_first, BLOCK_M)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    TWO_LOOPS: tl.constexpr = tiles_ptr is not None and not WHOLE
    for SHARED in tl.static_range(0, 2 if TWO_LOOPS else 1):
        if TWO_LOOPS:
            n_steps = tl.where((many > 1) == (SHARED == 1), tl.cdiv(length, BLOCK_M), 0)
        for block in tl.range(0, 1 if SINGLE else n_steps, num_stages=STAGES):
            i0 = i_first + block * BLOCK_M
            rows = i0 + tile_rows
            inside = (rows >= 0) & (rows < length)
            step = wide(i0)
            q_block = q_ptr + step * q_token
            dout_block = dout_ptr + step * dout_token
            q = operand(load_tile(q_block, q_offsets, inside, columns, D, BLOCK_D, True))
            dout = load_tile(dout_block, dout_offsets, inside, columns, D, BLOCK_D, True)
            dout = operand(dout)
            # exp2(score - inf) = 0 for what is outside
            lse = tl.load(lse_ptr + statistics + rows, mask=inside, other=float("inf"))
            scores = product(q, k, PRECISION)
            p = tl.exp2(scores * scale_log2 - lse[:, None])
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
                dq_base = dq_ptr + grad + (token + step) * dq_token
                dq = round_to(dq, dq_ptr.dtype.element_ty)
                store_tile(dq_base, dq_offsets, dq, inside, columns, D, BLOCK_D)

    # 4. scale and write; what isn't attended gets exact zeros
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
    dk = round_to(dk, dk_ptr.dtype.element_ty)
    dv = round_to(dv, dv_ptr.dtype.element_ty)
    store_tile(dk_ptr + grad, offsets, dk, key_inside, columns, D, BLOCK_D)
    store_tile(dv_ptr + grad, offsets, dv, key_inside, columns, D, BLOCK_D)
