"""The largest product of each word and sequence, and its token, by torch.

    z = weight x^T,  top = max of z over a sequence's tokens,  token = its first place

Words are taken some hundred at a time, so that z stays small: a row of z is a word, whose tokens
lie side by side. On a GPU 16-bit products add up in float32; a CPU's round their results, so there
the operands are float32.
"""

import torch

from ...packing import Sequences, equal_runs
from ...tracing import on_host
from ..product import product
from .reference import places

# Of z: as linear_cross_entropy's chunks.
CHUNK_BYTES = 64 << 20
TIMES_ON_GPU = 5
LEAST_WORDS = 64


def forward(
    x: torch.Tensor, weight: torch.Tensor, sequences: Sequences
) -> tuple[torch.Tensor, torch.Tensor]:
    """top, in float32 or float64, and token, int32, numbered over the batch: both (vocabulary,
    sequences). Of a sequence without tokens -inf, and any token."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    cu_seqlens, vocabulary = sequences.cu_seqlens, weight.shape[0]
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    top = x.new_full((vocabulary, count), -torch.inf, dtype=compute)
    token = torch.zeros((vocabulary, count), dtype=torch.int32, device=x.device)
    rows = x.flatten(0, -2)
    if not len(rows):
        return top, token
    runs, wide = None, len(rows)
    if cu_seqlens is not None and on_host(cu_seqlens):
        runs = equal_runs(cu_seqlens.tolist())
    elif cu_seqlens is not None:  # the lengths are on a GPU, for which the host doesn't wait
        index, kept = places(cu_seqlens, sequences.max_seqlen)
        wide = max(wide, kept.numel())
    rows = rows if x.is_cuda else rows.to(compute)
    step = chunk_words(wide, x.is_cuda)
    room = x.new_empty((min(step, vocabulary), len(rows)), dtype=compute)
    for first in range(0, vocabulary, step):
        part = slice(first, first + step)
        words = weight[part].to(rows.dtype)
        z = room[: len(words)]
        product(words, rows.t(), z)
        if cu_seqlens is None:
            _of_padded(z, sequences.key_mask, count, top[part], token[part])
        elif runs is not None:
            for run in runs:
                there = slice(run.sequence, run.sequence + run.count)
                tokens = z[:, run.token : run.token + run.count * run.length]
                _of_padded(tokens, None, run.count, top[part, there], token[part, there])
                token[part, there] += run.token
        else:
            spread = z[:, index].masked_fill_(~kept, -torch.inf)
            largest, place = spread.max(2)
            top[part] = largest
            token[part] = place + cu_seqlens[:-1]
    return top, token


def chunk_words(tokens: int, on_gpu: bool) -> int:
    """The most. tokens: with padding, where z is spread out."""
    return max(LEAST_WORDS, CHUNK_BYTES * (TIMES_ON_GPU if on_gpu else 1) // (4 * tokens))


def _of_padded(
    z: torch.Tensor,
    key_mask: torch.Tensor | None,
    count: int,
    top: torch.Tensor,
    token: torch.Tensor,
) -> None:
    """Fills top and token of sequences of one length. z is written to."""
    z = z.unflatten(1, (count, -1))
    if key_mask is not None:
        z.masked_fill_(~key_mask, -torch.inf)
    largest, place = z.max(2)
    top.copy_(largest)
    token.copy_(place + torch.arange(count, device=z.device) * z.shape[2])
