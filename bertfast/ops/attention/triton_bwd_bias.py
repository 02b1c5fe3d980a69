"""The gradient of scores' bias by distance: ds of triton_bwd_dq.py, summed over each distance.

    dbias[head, d] = sum of p * (dp - delta) over all sequences and all scores with key - query = d

p and dp are computed again. A matrix of scores is cut into square blocks; those on one diagonal of
blocks hold the same distances at the same places. So a program that owns a head and such a diagonal
adds block to block in its registers, of all the sequences of its share; it writes one block. A
second kernel adds the shares, and of a block the diagonals of its scores. No atomics, and every sum
in a fixed order.
Moves q, k, v and dout once for each diagonal, mostly from the second-level cache, and 4 bytes for
each score of a program's block, twice.
"""

import triton
import triton.language as tl

from .triton_core import attended, load_tile, operand, product, wide
from .triton_dropout import keep_tile
from .triton_scores import bias_log2, in_window


@triton.jit(
    do_not_specialize=[
        *("mask_batch", "lse_batch", "lse_head", "heads", "diagonals", "sequences", "each"),
        *("length", "site", "threshold"),
    ]
)
def attention_bwd_bias_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    parts_ptr,  # written: (shares, diagonals, heads, BLOCK, BLOCK)
    mask_ptr,  # one byte a key, 0 = masked; or None
    cu_ptr,  # first token of each sequence, or None: padded
    seed_ptr,  # one int64, or None without dropout
    bias_ptr,  # (heads, 2 * reach + 1)
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
    bias_head,
    mask_batch,
    lse_batch,
    lse_head,
    heads,
    diagonals,  # odd; the one in the middle has distance 0
    sequences,
    each,  # sequences of a share
    length,  # of a padded sequence
    scale_log2: tl.float32,  # scale * log2 e, the very number that the forward had
    site,
    threshold,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TF32: tl.constexpr,
    LEFT: tl.constexpr,  # keys to the sides that a query sees, or None: all
    RIGHT: tl.constexpr,
):
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    # 1. the head, the diagonal and the share
    program = tl.program_id(0)
    head = program % heads
    apart = program // heads % diagonals - diagonals // 2  # blocks from a query's to its keys'
    share = program // heads // diagonals
    columns = tl.arange(0, BLOCK_D)
    tile = tl.arange(0, BLOCK)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    last = tl.minimum((share + 1) * each, sequences)
    if LEFT is not None:  # nothing where the window sees none of the distances
        near = ((apart - 1) * BLOCK < RIGHT) & ((apart + 1) * BLOCK > -LEFT)
        last = tl.where(near, last, 0)

    # 2. over the share's sequences
    for batch in range(share * each, last):
        start = 0
        own = length
        if cu_ptr is not None:
            start = tl.load(cu_ptr + batch)
            own = tl.load(cu_ptr + batch + 1) - start
        low = 0
        high = own
        if mask_ptr is not None:
            low, high, _ = attended(mask_ptr + wide(batch) * mask_batch, own)
        batch64 = wide(batch)
        token = wide(start)
        head64 = wide(head)
        statistics = batch64 * lse_batch + head64 * lse_head + token

        # 3. over the diagonal's blocks. Dropout counts from low, and so do blocks.
        n_before = tl.cdiv(low, BLOCK)
        from_block = tl.maximum(-apart, -n_before)
        to_block = tl.minimum(tl.cdiv(high - low, BLOCK) - apart, tl.cdiv(own - low, BLOCK))
        for number in tl.range(from_block, to_block, num_stages=1):
            i0 = low + number * BLOCK
            j0 = i0 + apart * BLOCK
            rows = i0 + tile
            keys = j0 + tile
            inside = (rows >= 0) & (rows < own)
            on = keys < high
            if mask_ptr is not None:
                mask_row = mask_ptr + batch64 * mask_batch
                on = on & (tl.load(mask_row + keys, mask=on, other=0) != 0)
            base = q_ptr + batch64 * q_batch + (token + i0) * q_token + head64 * q_head
            offsets = tile[:, None] * q_token + columns[None, :]
            q = operand(load_tile(base, offsets, inside, columns, D, BLOCK_D, True))
            base = k_ptr + batch64 * k_batch + (token + j0) * k_token + head64 * k_head
            offsets = tile[:, None] * k_token + columns[None, :]
            k = operand(load_tile(base, offsets, on, columns, D, BLOCK_D, True))
            lse = tl.load(lse_ptr + statistics + rows, mask=inside, other=float("inf"))
            scores = product(q, k, PRECISION) * scale_log2
            scores += bias_log2(bias_ptr, bias_head, head, rows, keys)
            p = tl.where(on[None, :], tl.exp2(scores - lse[:, None]), 0.0)
            if LEFT is not None:
                p = tl.where(in_window(rows, keys, LEFT, RIGHT), p, 0.0)
            base = dout_ptr + batch64 * dout_batch + (token + i0) * dout_token + head64 * dout_head
            offsets = tile[:, None] * dout_token + columns[None, :]
            dout = operand(load_tile(base, offsets, inside, columns, D, BLOCK_D, True))
            base = v_ptr + batch64 * v_batch + (token + j0) * v_token + head64 * v_head
            offsets = tile[:, None] * v_token + columns[None, :]
            v = operand(load_tile(base, offsets, on, columns, D, BLOCK_D, True))
            delta = tl.load(delta_ptr + statistics + rows, mask=inside, other=0.0)
            dp = product(dout, v, PRECISION)
            if seed_ptr is not None:
                keep = keep_tile(
                    *(seed, batch * heads + head, i0 - low, j0 - low),
                    *(site, threshold, BLOCK, BLOCK),
                )
                dp = tl.where(keep, dp, 0.0)
            sums += p * (dp - delta[:, None])

    # 4. the block
    parts_ptr += wide(program) * (BLOCK * BLOCK)
    tl.store(parts_ptr + tile[:, None] * BLOCK + tile[None, :], sums)


@triton.jit(do_not_specialize=["heads", "diagonals", "shares"])
def bias_sums_kernel(
    parts_ptr,  # (shares, diagonals, heads, BLOCK, BLOCK)
    line_ptr,  # written: (heads, (diagonals + 1) * BLOCK), the middle has distance 0
    heads,
    diagonals,
    shares,
    keep_scale: tl.float32,
    BLOCK: tl.constexpr,
):
    """BLOCK distances of a head, which lie in two diagonals of blocks."""
    program = tl.program_id(0)
    head = program % heads
    diagonal = program // heads  # of the greater distances' blocks; those of the other are one less
    tile = tl.arange(0, BLOCK)
    key = tile[:, None] + tile[None, :]  # of row i and the c-th distance
    beyond = key >= BLOCK
    which = tl.where(beyond, diagonal, diagonal - 1)
    on = (which >= 0) & (which < diagonals)
    place = tile[:, None] * BLOCK + tl.where(beyond, key - BLOCK, key)
    base = parts_ptr + (which.to(tl.int64) * heads + head) * (BLOCK * BLOCK) + place
    step = wide(diagonals) * heads * (BLOCK * BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for share in range(0, shares):
        sums += tl.load(base + wide(share) * step, mask=on, other=0.0)
    line_ptr += (wide(head) * (diagonals + 1) + diagonal) * BLOCK
    tl.store(line_ptr + tile, tl.sum(sums, axis=0) * keep_scale)
