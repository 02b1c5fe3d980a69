"""out = dropout(softmax(scale * q k^T)) v, and lse = log2(sum(exp(scale * q k^T))).

Saved for the backward: q, k, v, out, lse and the seed; no score is. lse is float32 and a logarithm
to base 2, as the kernels compute with exp2: so the backward subtracts what the forward did, without
another rounding. It is 0 for a row without keys.

One program a tile of BLOCK_M queries; it runs over the keys in blocks of BLOCK_N with the online
softmax: m is the largest scale_log2 * product q k^T so far, rounded, l the sum of
exp2(scale_log2 * product - m), acc the sum of the same times v, both rescaled by exp2 of the
difference of the two m when m grows. m is kept as the rounded product: were it multiplied again, a
fused multiply-add would subtract the exact product from the rounded one, and large scores would
rescale by that rounding error where m didn't grow at all. Where one block holds all keys there is
no loop and nothing to rescale (SINGLE). Dropout acts on what goes into acc, not on l.

A tile that several sequences share and that ends with a sum that isn't finite is done again,
sequence by sequence, where each lies, with zeros in all other rows (WINDOW): a NaN in one sequence
times the zeros of the others' scores would be NaN.
Moves 4 values an element of q (q, k, v read; out written) where a tile holds all queries, and
2 + 2 * tiles where it doesn't, mostly from the second-level cache.
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
from .triton_dropout import keep_each, keep_tile
from .triton_scores import bias_log2, in_window


@triton.jit
def _forward_tile(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    mask_ptr,
    cu_ptr,
    tiles_ptr,
    seed_ptr,
    bias_ptr,
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
    bias_head,
    lse_batch,
    lse_head,
    heads,
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
    SINGLE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Does the tile, or of a shared one a sequence; says whether all its sums are finite."""
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    # 1. the queries
    token = wide(start)
    batch64 = wide(batch)
    columns = tl.arange(0, BLOCK_D) + zero
    tile_rows = tl.arange(0, BLOCK_M) + zero
    rows = first + tile_rows
    row_inside = (rows >= 0) & (rows < length)
    if WINDOW:
        row_inside = (rows >= begin) & (rows < end)
    q_ptr += batch64 * q_batch + (token + first) * q_token + wide(head) * q_head
    q_offsets = tile_rows[:, None] * q_token + columns[None, :]
    counts = row_inside
    if mask_ptr is not None:
        counts = row_inside & (low < high)  # zeros where there is no key, whatever lies there
    q = operand(load_tile(q_ptr, q_offsets, counts, columns, D, BLOCK_D, True))
    if scale_log2 < 0:  # so that the largest product belongs to the largest score
        q = -q
        scale_log2 = -scale_log2
    # Not zero, as -inf, the score of a key that doesn't count, times zero is NaN.
    scale_log2 = tl.maximum(scale_log2, 1.1754943508222875e-38)
    k_ptr += batch64 * k_batch + token * k_token + wide(head) * k_head
    v_ptr += batch64 * v_batch + token * v_token + wide(head) * v_head
    if tiles_ptr is not None:
        row_which, row_origin = segments(cu_ptr, batch, start, many, rows)

    # 2. over the keys: blocks in which every key counts for every query, then the rest, in smaller
    # steps, as most of the last block may be beyond the sequence's end. With a gap in the key_mask,
    # or a window, all is the rest.
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    # One loop for float32, whose products are what takes time; two would spill.
    FLOAT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    ALL_CHECKED: tl.constexpr = SINGLE or FLOAT or LEFT is not None
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
        for block in tl.range(
            0, 1 if SINGLE else tl.cdiv(to_key - from_key, STEPS[CHECK]), num_stages=STAGES
        ):
            j0 = from_key + block * STEPS[CHECK]
            keys = j0 + tile_keys
            on = keys < high
            if WINDOW:
                on = (keys >= begin) & (keys < end)
            if CHECK and mask_ptr is not None:
                on = on & (tl.load(mask_ptr + keys, mask=on, other=0) != 0)
            k_block = k_ptr + wide(j0) * k_token
            k = load_tile(k_block, k_offsets, on, columns, D, BLOCK_D, CHECK)
            scores = product(q, operand(k), PRECISION)
            if bias_ptr is not None:
                scores = scores * scale_log2 + bias_log2(bias_ptr, bias_head, head, rows, keys)
            key_which = tl.zeros_like(keys)
            key_origin = tl.zeros_like(keys)
            if CHECK:
                scores += tl.where(on, 0.0, float("-inf"))[None, :]
                if tiles_ptr is not None:
                    if many > 1:
                        key_which, key_origin = segments(cu_ptr, batch, start, many, keys)
                        same = row_which[:, None] == key_which[None, :]
                        scores = tl.where(same, scores, float("-inf"))
                if LEFT is not None:
                    seen = in_window(rows, keys, LEFT, RIGHT)
                    scores = tl.where(seen, scores, float("-inf"))
            if bias_ptr is None:
                m_new = tl.maximum(m, tl.max(scores, axis=1) * scale_log2)
            else:
                m_new = tl.maximum(m, tl.max(scores, axis=1))
            m_used = m_new
            if CHECK:
                # A row that has seen no key yet is all -inf: any finite m serves it.
                m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
            if bias_ptr is None:
                p = tl.exp2(scores * scale_log2 - m_used[:, None])
            else:
                p = tl.exp2(scores - m_used[:, None])
            if SINGLE:
                l = tl.sum(p, axis=1)  # noqa: E741
            else:
                alpha = tl.exp2(m - m_used)
                l = l * alpha + tl.sum(p, axis=1)  # noqa: E741
                acc = acc * alpha[:, None]
            m = m_new
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
                            *(
                                seed,
                                batch * heads + head,
                                first,
                                j0,
                                site,
                                threshold,
                                BLOCK_M,
                                STEPS[CHECK],
                            )
                        )
                else:
                    keep = keep_tile(
                        *(seed, batch * heads + head, first - low, j0 - low),
                        *(site, threshold, BLOCK_M, STEPS[CHECK]),
                    )
                p = tl.where(keep, p, 0.0)
            v_block = v_ptr + wide(j0) * v_token
            v = load_tile(v_block, v_offsets, on, columns, D, BLOCK_D, CHECK)
            p = operand(round_to(p, v_ptr.dtype.element_ty))
            acc = tl.dot(p, operand(v), acc, input_precision=PRECISION)

    # 3. normalise and write
    empty = l == 0.0
    out = acc * (keep_scale / tl.where(empty, 1.0, l))[:, None]
    out_ptr += batch64 * out_batch + (token + first) * out_token + wide(head) * out_head
    store_tile(
        out_ptr,
        tile_rows[:, None] * out_token + columns[None, :],
        round_to(out, out_ptr.dtype.element_ty),
        row_inside,
        columns,
        D,
        BLOCK_D,
    )
    if lse_ptr is not None:
        lse = tl.where(empty, 0.0, m + tl.log2(tl.where(empty, 1.0, l)))
        lse_ptr += batch64 * lse_batch + wide(head) * lse_head + token
        tl.store(lse_ptr + rows, lse, mask=row_inside)
    return all_finite(acc)


@triton.jit(do_not_specialize=VARYING)
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # None: not saved
    mask_ptr,  # one byte a key, 0 = masked; or None
    cu_ptr,  # first token of each sequence, or None: padded
    tiles_ptr,  # the plan's list, or None
    seed_ptr,  # one int64, or None without dropout
    bias_ptr,  # (heads, 2 * reach + 1), or None
    q_batch,  # strides in elements: from sequence to sequence (0 if packed), token, head
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
    bias_head,  # 1 without a bias
    mask_batch,
    lse_batch,
    lse_head,
    heads,
    n_tiles,
    length,  # of a padded sequence
    scale_log2: tl.float32,  # scale * log2 e
    site,
    threshold,
    keep_scale: tl.float32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,  # keys in a step where not all count
    PARTS: tl.constexpr,  # programs for a plan's tile
    TF32: tl.constexpr,
    STAGES: tl.constexpr,
    SINGLE: tl.constexpr,  # one block holds all keys
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
            # Dropout counts from the first token: tiles start at multiples of BLOCK_M from there.
            first -= (BLOCK_M - low % BLOCK_M) % BLOCK_M
    if first >= length:
        return

    # 2. the tile, and once more what another's NaN has spoilt
    finite = _forward_tile(
        *(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr, cu_ptr, tiles_ptr, seed_ptr),
        *(bias_ptr,),
        *(q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head),
        *(out_batch, out_token, out_head, bias_head),
        *(lse_batch, lse_head, heads, scale_log2, site),
        *(threshold, keep_scale, batch, head, first, start, length, many, low, high, solid),
        *(0, 0, 0, D, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_T, TF32, STAGES, SINGLE, LEFT, RIGHT),
        WINDOW=False,
    )
    if tiles_ptr is not None:
        if (many > 1) & (finite == 0):
            zero = zero_unknown_to_the_compiler(tiles_ptr)
            for index in range(0, many):
                begin = tl.load(cu_ptr + batch + index) - start
                end = tl.load(cu_ptr + batch + index + 1) - start
                _forward_tile(
                    *(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr, cu_ptr, tiles_ptr, seed_ptr),
                    *(bias_ptr,),
                    *(q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head),
                    *(out_batch, out_token, out_head, bias_head),
                    *(lse_batch, lse_head, heads, scale_log2, site),
                    *(threshold, keep_scale, batch, head, first, start, length, many),
                    *(low, high, solid, begin, end, zero),
                    *(D, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_T, TF32, STAGES, SINGLE, LEFT, RIGHT),
                    WINDOW=True,
                )
