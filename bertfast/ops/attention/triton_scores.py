"""Rotary positions, a window and a bias by distance, inside attention's kernels (scores.py).

q and k are rotated before, by a kernel of its own: where they are loaded, in the loops of the
others, it would be done again for each tile, and takes the registers that the products need (up to
six times the instructions per score where tensor cores read registers). Their gradients are rotated
back where they are stored, before they are rounded.
"""

import triton
import triton.language as tl

from ..triton_lib import round_to, to_float
from .triton_core import find_tile, segments, wide

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def positions(cu_ptr, tiles_ptr, batch, start, many, tokens):
    """The positions of a tile's tokens in their sequences."""
    if tiles_ptr is not None:
        _, origin = segments(cu_ptr, batch, start, many, tokens)
        tokens -= origin
    return tokens


@triton.jit
def rotated_back(value, position, inside, cos_ptr, sin_ptr, D: tl.constexpr):
    """The gradient of tokens' heads, of that of the rotated ones; both float32."""
    half: tl.constexpr = D // 2
    columns = tl.arange(0, value.shape[1])
    upper = columns >= half
    partner = tl.where(upper, columns - half, columns + half)[None, :]
    other = tl.gather(value, tl.broadcast_to(partner, value.shape), 1)
    offsets = position[:, None] * half + tl.where(upper, columns - half, columns)[None, :]
    mask = inside[:, None] & (columns < D)[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0)
    return value * cos + tl.where(upper[None, :], -other, other) * sin


@triton.jit(do_not_specialize=["heads", "n_tiles", "length"])
def rotate_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,  # written
    k_out_ptr,
    cu_ptr,  # first token of each sequence, or None: padded
    tiles_ptr,  # the plan's list, or None
    cos_ptr,
    sin_ptr,
    q_batch,  # strides in elements: from sequence to sequence (0 if packed), token, head
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    out_batch,
    out_token,
    out_head,
    heads,
    n_tiles,
    length,  # of a padded sequence
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,  # columns of half a head
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # programs for a plan's tile
):
    """q and k of a tile of tokens, rotated and rounded. Moves 4 values per element of q."""
    batch, head, first, start, length, many = find_tile(
        cu_ptr, tiles_ptr, heads, n_tiles, length, BLOCK, PARTS
    )
    if first >= length:
        return
    tile = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_H)
    tokens = first + tile
    mask = (tokens < length)[:, None] & (columns < D // 2)[None, :]
    position = positions(cu_ptr, tiles_ptr, batch, start, many, tokens)
    offsets = position[:, None] * (D // 2) + columns[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0)
    token = wide(start) + first
    q_ptr += wide(batch) * q_batch + token * q_token + wide(head) * q_head
    k_ptr += wide(batch) * k_batch + token * k_token + wide(head) * k_head
    out = wide(batch) * out_batch + token * out_token + wide(head) * out_head
    out_offsets = tile[:, None] * out_token + columns[None, :]
    _rotate(
        *(q_ptr, tile[:, None] * q_token + columns[None, :], q_out_ptr + out, out_offsets),
        *(cos, sin, mask, D),
    )
    _rotate(
        *(k_ptr, tile[:, None] * k_token + columns[None, :], k_out_ptr + out, out_offsets),
        *(cos, sin, mask, D),
    )


@triton.jit
def _rotate(base, offsets, out, out_offsets, cos, sin, mask, D: tl.constexpr):
    first = to_float(tl.load(base + offsets, mask=mask, other=0.0))
    second = to_float(tl.load(base + D // 2 + offsets, mask=mask, other=0.0))
    dtype: tl.constexpr = base.dtype.element_ty
    tl.store(out + out_offsets, round_to(first * cos - second * sin, dtype), mask=mask)
    tl.store(out + D // 2 + out_offsets, round_to(second * cos + first * sin, dtype), mask=mask)


@triton.jit
def bias_log2(bias_ptr, bias_head, head, rows, keys):
    """(rows, keys): the bias of each score, times log2 e."""
    reach = bias_head // 2
    distance = keys[None, :] - rows[:, None]
    place = tl.minimum(tl.maximum(distance, -reach), reach) + reach
    return to_float(tl.load(bias_ptr + wide(head) * bias_head + place)) * _LOG2_E


@triton.jit
def in_window(rows, keys, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """(rows, keys) booleans: True for keys in a query's window."""
    distance = keys[None, :] - rows[:, None]
    return (distance >= -LEFT) & (distance <= RIGHT)
