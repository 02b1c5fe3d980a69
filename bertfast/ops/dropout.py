"""Dropout as a pure function of (seed, site, coordinates): the mask that every backend draws.

Philox4x32-7 with key = (seed low, seed high) and four 32-bit counters, the last of them the site.
One call yields eight 16-bit draws: draw k is half k & 1 (0 = low) of word k >> 1. A value is kept
if its draw is at least round(65536 p), and scaled by the inverse of the keep probability that
results.

Kind "row" (layer_norm), for a row and a column:
    counters = (column >> 3, row low, row high, site),  k = column & 7
Kind "attention", for query i and key j of a sequence, counted from its first token:
    counters = ((j >> 5) << 3 | (j & 7), (i >> 4) << 3 | (i & 7), batch * H + head, site)
    k = ((i >> 3) & 1) * 4 + ((j >> 3) & 3)
Two rows by four columns with stride 8 are what one thread holds of a tensor-core fragment.

The functions here compute the draws with torch, in int64 (uint32 arithmetic is not complete in
torch); the kernels compute the same bits in 32-bit registers.
"""

import torch

ROUNDS = 7
KINDS = ("row", "attention")

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The least 16-bit draw that is kept: 0 keeps everything, 65536 nothing."""
    return round(65536 * p)


def keep_scale(threshold: int) -> float:
    """The inverse of the keep probability that the threshold gives; 0 if nothing is kept."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def draw_seed(device: torch.device) -> torch.Tensor:
    """One int64 on the device from torch's generator: no host sync, replayable, checkpointable."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b; by 16-bit halves, since the product overflows an int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _MASK32


def philox(counters, key, rounds: int = ROUNDS):
    """Philox4x32: four words (int64 tensors holding 32 bits) from four counters and two keys."""
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def _draws(seed: torch.Tensor, site: int, c0, c1, c2) -> torch.Tensor:
    """The eight draws of each counter, in a new last dimension."""
    seed = seed.reshape(())
    c3 = torch.full_like(c0, site)
    words = philox((c0, c1, c2, c3), (seed & _MASK32, (seed >> 32) & _MASK32))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1)


def row_keep_mask(seed, site: int, rows: torch.Tensor, width: int, threshold: int):
    """The mask of kind "row", (len(rows), width), for the given row numbers (int64)."""
    group = torch.arange((width + 7) // 8, device=seed.device)
    c0, row = torch.broadcast_tensors(group, rows[:, None])
    draws = _draws(seed, site, c0, row & _MASK32, (row >> 32) & _MASK32)
    return draws.flatten(1)[:, :width] >= threshold


def attention_keep_mask(seed, site: int, shape, threshold: int, start=None) -> torch.Tensor:
    """The mask of kind "attention" for shape (batch, heads, queries, keys).

    start: for each of the batch the position of its first token, which then counts as 0. What lies
    before has negative coordinates, taken modulo 2^32.
    """
    batch, heads, queries, keys = shape
    device = seed.device
    i = torch.arange(queries, device=device)[None, :, None]
    j = torch.arange(keys, device=device)[None, None]
    if start is not None:
        start = start.to(torch.int64).repeat_interleave(heads, output_size=batch * heads)
        i, j = i - start[:, None, None], j - start[:, None, None]
    shape = (batch * heads, queries, keys)
    c0 = (((j >> 5) << 3 | (j & 7)) & _MASK32).expand(shape)
    c1 = (((i >> 4) << 3 | (i & 7)) & _MASK32).expand(shape)
    c2 = torch.arange(batch * heads, device=device)[:, None, None].expand(shape)
    k = ((i >> 3) & 1) * 4 + ((j >> 3) & 3)
    draws = _draws(seed, site, c0, c1, c2)
    chosen = draws.gather(-1, k.expand(shape)[..., None]).squeeze(-1)
    return (chosen >= threshold).view(batch, heads, queries, keys)


def dropout_keep_mask(
    seed: torch.Tensor, site: int, shape: tuple[int, ...], p: float, kind: str
) -> torch.Tensor:
    """The very mask that the kernels draw: True where a value is kept.

    seed: one int64 element; the mask lies on its device. kind "row" takes any shape whose last
    dimension is the row's width; kind "attention" takes (batch, heads, queries, keys).
    """
    from .checks import check_dropout, check_seed

    check_dropout(p, site)
    check_seed(seed, seed.device if isinstance(seed, torch.Tensor) else None)
    shape = tuple(shape)
    if kind == "row":
        if not shape:
            raise ValueError("shape must have at least one dimension for kind 'row', got ()")
        width = shape[-1]
        count = 1
        for size in shape[:-1]:
            count *= size
        rows = torch.arange(count, device=seed.device)
        return row_keep_mask(seed, site, rows, width, threshold(p)).view(shape)
    if kind == "attention":
        if len(shape) != 4:
            raise ValueError(
                f"shape must be (batch, heads, queries, keys) for kind 'attention', got {shape}"
            )
        return attention_keep_mask(seed, site, shape, threshold(p))
    raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
