"""plan: the tile list of lengths that only the device knows, made there without waiting for it.

The list has room for the most tiles that there can be; what is left over is empty. Where the host
knows the lengths, `lay_out` is cheaper.
"""

import torch

from .. import checks
from ..tracing import on_host
from .lengths import check_bounds
from .tiles import Plan, tile_size


def plan(cu_seqlens: torch.Tensor, max_seqlen: int, total: int | None = None) -> Plan:
    """The tile list of the packed batch whose sequence b has tokens cu_seqlens[b] to [b + 1].

    cu_seqlens: int32 (sequences + 1,), from 0 to the number of tokens. max_seqlen: the longest
    length or more. attention takes the plan with the same two.

    total: the number of tokens, which a caller knows without waiting for the device: packed
    tensors' first size. Without it the list has room for sequences of max_seqlen each, whose empty
    part costs a little, and the tiles' size goes by max_seqlen alone.
    """
    checks.check_cu_seqlens(cu_seqlens)
    checks.check_max_seqlen(max_seqlen)
    if total is not None:
        checks.check_int("total", total, 0, checks.INT32_MAX)
    known, bounds = total, None
    if on_host(cu_seqlens):
        check_bounds(cu_seqlens.numpy(), max_seqlen, total, "total")
        known, bounds = int(cu_seqlens[-1]), cu_seqlens.clone()
    batch, device = cu_seqlens.shape[0] - 1, cu_seqlens.device
    tile = tile_size(batch, max_seqlen, total)
    room = batch * (-(-max_seqlen // tile))
    if known is not None:
        room = min(room, -(-known // tile) + batch)
    if room == 0:
        tiles = torch.zeros((0, 3), dtype=torch.int32, device=device)
        count = torch.zeros(1, dtype=torch.int32, device=device)
        return Plan(tiles, count, tile, batch, max_seqlen, known, bounds)
    cu = cu_seqlens.to(torch.int64)
    index = torch.arange(batch + 1, device=device)

    # 1. Were a group to start at sequence i, it would end before sequence `after[i]`.
    after = torch.searchsorted(cu, cu + tile, right=True) - 1
    after = torch.maximum(after, index + 1).clamp(max=batch)

    # 2. Which sequences start a group: those that are reached from 0 by steps of `after`. After
    # round n all within 2^n steps are marked.
    head = (index == 0).to(torch.int32)
    jump = after
    for _ in range(batch.bit_length()):
        head = head.scatter_reduce(0, jump, head, "amax")
        jump = jump[jump]

    # 3. The tiles of each group, and the list of all.
    groups = torch.where(head[:-1] > 0, cu[after[:-1]] - cu[:-1], 0)
    ends = ((groups + tile - 1) // tile).cumsum(0)
    slot = torch.arange(room, device=device)
    owner = torch.searchsorted(ends, slot, right=True).clamp(max=batch - 1)
    before = torch.where(owner > 0, ends[owner - 1], 0)
    inside = slot < ends[-1]
    columns = (owner, (slot - before) * tile, after[owner] - owner)
    tiles = torch.stack([torch.where(inside, column, 0) for column in columns], 1)
    tiles, count = tiles.to(torch.int32), ends[-1:].to(torch.int32)
    return Plan(tiles, count, tile, batch, max_seqlen, known, bounds)
