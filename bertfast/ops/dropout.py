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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..tracing import can_look_at

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


class Dropout(NamedTuple):
    """The dropout of one call, as it travels to the kernels."""

    seed: torch.Tensor | None  # one int64 element; None: nothing is dropped, or torch draws
    threshold: int  # the least 16-bit draw that is kept; 0: nothing is dropped
    scale: float  # of what is kept
    site: int
    rows: torch.Tensor | None  # kind "row": the numbers of the rows, int64; None: from 0


NO_DROPOUT = Dropout(None, 0, 1.0, 0, None)


def dropout_of(
    p: float,
    seed: torch.Tensor | None,
    site: int,
    device: torch.device,
    rows: torch.Tensor | None = None,
) -> Dropout:
    """The dropout of a public call; its seed is drawn from torch's generator if it is None."""
    least = threshold(p)
    if not least:
        return NO_DROPOUT
    return restored(draw_seed(device) if seed is None else seed, least, site, rows)


def may_be_torchs(backend: str, device: torch.device, p: float, seed: torch.Tensor | None) -> bool:
    """True where nothing has to draw the same mask again, as no seed and no backend was asked for:
    it may then be torch's own, which is much faster on a CPU."""
    return p < 1.0 and device.type == "cpu" and backend == "torch" and seed is None


def torchs(p: float) -> Dropout:
    """A dropout whose mask torch draws. Only the references take it."""
    least = threshold(p)
    return Dropout(None, least, keep_scale(least), 0, None) if least else NO_DROPOUT


def restored(
    seed: torch.Tensor | None, threshold: int, site: int, rows: torch.Tensor | None = None
) -> Dropout:
    """The dropout whose parts went through a registered op one by one."""
    if not threshold:
        return NO_DROPOUT
    rows = None if rows is None else rows.contiguous()
    return Dropout(seed, threshold, keep_scale(threshold), site, rows)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b, for b below and a near 2^32. The product would overflow, so
    what a lacks of 2^32 is multiplied, and b added where 2^32 b belongs."""
    product = (a - 2**32) * b
    return (product >> 32) + b, product & _MASK32


def philox(
    counters: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four words (int64 tensors holding 32 bits) from four counters and two keys."""
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def _kept(
    seed: Tensor, site: int, counters: tuple[Tensor, Tensor, Tensor], threshold: int
) -> Tensor:
    """The eight draws of each counter, True where a value is kept, in a new last dimension.
    counters: the first three; the site is the fourth."""
    seed = seed.reshape(())
    last = torch.full_like(counters[0], site)
    words = philox((*counters, last), (seed & _MASK32, (seed >> 32) & _MASK32))
    halves = [
        kept for word in words for kept in ((word & 0xFFFF) >= threshold, word >= threshold << 16)
    ]
    return torch.stack(halves, -1)


def row_keep_mask(seed: Tensor, site: int, rows: Tensor, width: int, threshold: int) -> Tensor:
    """The mask of kind "row", (len(rows), width), for the given row numbers (int64)."""
    group = torch.arange((width + 7) // 8, device=seed.device)
    c0, row = torch.broadcast_tensors(group, rows[:, None])
    kept = _kept(seed, site, (c0, row & _MASK32, (row >> 32) & _MASK32), threshold)
    return kept.flatten(1)[:, :width]


def attention_keep_mask(
    seed: Tensor,
    site: int,
    shape: Sequence[int],
    threshold: int,
    start: Tensor | None = None,
    sequence: int = 0,
) -> Tensor:
    """The mask of kind "attention" for shape (batch, heads, queries, keys).

    start: for each of the batch the position of its first token, which then counts as 0. What lies
    before has negative coordinates, taken modulo 2^32. sequence: the number of the batch's first.
    """
    batch, heads, queries, keys = shape
    before = 0 if start is None else _most_before(start, max(queries, keys))
    numbers = torch.arange(sequence * heads, (sequence + batch) * heads, device=seed.device)
    block = _attention_block(
        seed, site, numbers, before + queries, before + keys, threshold, -before
    )
    if start is None or before == 0:
        return block.unflatten(0, (batch, heads))
    first = before - start.to(torch.int64)[:, None]
    i = (first + torch.arange(queries, device=seed.device))[:, None, :, None]
    j = (first + torch.arange(keys, device=seed.device))[:, None, None]
    n = torch.arange(batch * heads, device=seed.device).view(batch, heads, 1, 1)
    return block[n, i, j]


def _most_before(start: torch.Tensor, length: int) -> int:
    """The most positions before a row's first token, rounded up to 32s: calls repeat after that.
    On a CPU the positions are read; elsewhere reading would wait for the device, so it is the
    length."""
    if start.device.type == "cpu" and can_look_at(start) and start.numel() > 0:
        length = int(start.max())
    return -(-length // 32) * 32


def _attention_block(
    seed: Tensor, site: int, numbers: Tensor, queries: int, keys: int, threshold: int, first: int
) -> Tensor:
    """(numbers, queries, keys), for numbers batch * H + head, and for coordinates that both
    begin with `first`, a multiple of 32. Each call is made once: its draws are two queries by four
    keys."""
    device, count = seed.device, numbers.shape[0]
    rows, columns = -(-queries // 16), -(-keys // 32)
    c1 = torch.arange(first // 2, first // 2 + 8 * rows, device=device) & _MASK32
    c0 = torch.arange(first // 4, first // 4 + 8 * columns, device=device) & _MASK32
    c2 = numbers[:, None, None]
    c0, c1, c2 = torch.broadcast_tensors(c0, c1[:, None], c2)
    kept = _kept(seed, site, (c0, c1, c2), threshold)
    kept = kept.view(count, rows, 8, columns, 8, 2, 4).permute(0, 1, 5, 2, 3, 6, 4)
    return kept.reshape(count, 16 * rows, 32 * columns)[:, :queries, :keys]


def dropout_keep_mask(
    seed: torch.Tensor, site: int, shape: tuple[int, ...], p: float, kind: str
) -> torch.Tensor:
    """The very mask that the kernels draw: True where a value is kept.

    seed: one int64 element; the mask lies on its device. site: the number of the dropout in its
    layer, as the op was given it. p: the probability with which a value is dropped. kind "row"
    takes any shape whose last dimension is the row's width; kind "attention" takes (batch, heads,
    queries, keys).
    """
    checks.check_seed(seed)
    checks.check_int("site", site, 0, checks.INT32_MAX)
    checks.check_number("p", p, 0, 1)
    checks.check_choice("kind", kind, KINDS)
    shape = checks.check_ints("shape", shape, 0)
    if kind == "row":
        if not shape:
            raise ValueError("shape must have at least one dimension for kind 'row', got ()")
        width = shape[-1]
        count = 1
        for size in shape[:-1]:
            count *= size
        rows = torch.arange(count, device=seed.device)
        return row_keep_mask(seed, site, rows, width, threshold(p)).view(shape)
    if len(shape) != 4:
        raise ValueError(
            f"shape must be (batch, heads, queries, keys) for kind 'attention', got {shape}"
        )
    return attention_keep_mask(seed, site, shape, threshold(p))
