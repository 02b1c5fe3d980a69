"""Dropout's draws for a block of scores, inside attention's kernels.

The mask is dropout.py's kind "attention". One Philox call yields eight draws, for two rows by four
columns with stride 8, which is what a thread of the tensor cores holds of a fragment. Which form
serves depends on where the coordinates start:
    keep_tile   rows from a multiple of 16, columns from one of 32: a call for eight scores
    keep_rows   rows from anywhere: a call for four scores, half of its draws unused
    keep_each   rows and columns with a start each, as where sequences share a tile: a call a score
Words are compared unsplit: a draw in the upper half where it is, one in the lower half shifted
there. The lower bits can't change whether a word reaches threshold << 16.
"""

import triton
import triton.language as tl


@triton.jit
def _unsigned(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def philox7(seed, c0, c1, c2, c3):
    """Philox4x32-7 as in dropout.py. The counters' shapes broadcast: what depends on rows or on
    columns alone is computed once for each, which saves the first two of seven rounds."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    A: tl.constexpr = 0xD2511F53
    B: tl.constexpr = 0xCD9E8D57
    for _ in tl.static_range(7):
        old0 = c0
        old2 = c2
        c0 = tl.umulhi(B, old2) ^ c1 ^ k0
        c2 = tl.umulhi(A, old0) ^ c3 ^ k1
        c1 = tl.mul(B, old2, sanitize_overflow=False)
        c3 = tl.mul(A, old0, sanitize_overflow=False)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def keep_tile(seed, batch_head, i0, j0, site, threshold, M: tl.constexpr, N: tl.constexpr):
    """(M, N) booleans for rows i0.. and columns j0.., multiples of 16 and 32. Nothing moves between
    threads where the scores lie as the tensor cores leave them."""
    rows = (i0 >> 1) + tl.arange(0, M // 2)
    columns = (j0 >> 2) + tl.arange(0, N // 4)
    zero = tl.full((1, 1), 0, tl.uint32)
    w0, w1, w2, w3 = philox7(
        seed,
        _unsigned(columns)[None, :],
        _unsigned(rows)[:, None],
        zero + batch_head.to(tl.uint32),
        zero + site.to(tl.uint32),
    )
    # Draw k = 4 b + 2 g + e is half e of word 2 b + g, for row bit b and column bits (g, e).
    low = tl.join(tl.join(w0 << 16, w2 << 16), tl.join(w1 << 16, w3 << 16))
    high = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    draws = tl.join(low, high)  # row and column of the call, then b, g, e
    draws = tl.reshape(draws, (M // 16, 8, N // 32, 8, 2, 2, 2))
    draws = tl.reshape(tl.permute(draws, (0, 4, 1, 2, 5, 6, 3)), (M, N))
    return draws >= _unsigned(threshold << 16)


@triton.jit
def keep_rows(seed, batch_head, i0, j0, site, threshold, M: tl.constexpr, N: tl.constexpr):
    """The same with i0 anywhere: each row makes its own calls and uses its half of the draws."""
    i = i0 + tl.arange(0, M)
    columns = (j0 >> 2) + tl.arange(0, N // 4)
    zero = tl.full((1, 1), 0, tl.uint32)
    w0, w1, w2, w3 = philox7(
        seed,
        _unsigned(columns)[None, :],
        _unsigned(((i >> 4) << 3) | (i & 7))[:, None],
        zero + batch_head.to(tl.uint32),
        zero + site.to(tl.uint32),
    )
    upper = ((i & 8) != 0)[:, None]
    first = tl.where(upper, w2, w0)
    second = tl.where(upper, w3, w1)
    draws = tl.join(tl.join(first << 16, second << 16), tl.join(first, second))  # then g, e
    draws = tl.permute(tl.reshape(draws, (M, N // 32, 8, 2, 2)), (0, 1, 3, 4, 2))
    return tl.reshape(draws, (M, N)) >= _unsigned(threshold << 16)


@triton.jit
def keep_each(seed, batch_head, i, j, site, threshold):
    """The same with a call for each score, rows and columns each with a coordinate of their own:
    batch_head and i are (M, 1), j is (1, N)."""
    w0, w1, w2, w3 = philox7(
        seed,
        _unsigned(((j >> 5) << 3) | (j & 7)),
        _unsigned(((i >> 4) << 3) | (i & 7)),
        _unsigned(batch_head),
        tl.full((1, 1), 0, tl.uint32) + site.to(tl.uint32),
    )
    lower = (j & 16) == 0
    word = tl.where((i & 8) == 0, tl.where(lower, w0, w1), tl.where(lower, w2, w3))
    word = tl.where((j & 8) == 0, word << 16, word)
    return word >= _unsigned(threshold << 16)
