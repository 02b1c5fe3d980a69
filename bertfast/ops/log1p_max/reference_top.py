"""The largest product of each word and sequence of a chunk, and its token, by torch. chunks.py says
what they are."""

import torch

from ...packing import Sequences, equal_runs
from ...tracing import on_host
from .reference import places


def forward(z: torch.Tensor, sequences: Sequences, top: torch.Tensor, token: torch.Tensor) -> None:
    """Fills top and token, (sequences, words), but where there are no tokens. z is (words, tokens)
    and is written to."""
    bounds = sequences.cu_seqlens
    if bounds is None:
        _of_padded(z, sequences.key_mask, len(top), top, token)
    elif on_host(bounds):
        for run in equal_runs(bounds.tolist()):
            there = slice(run.sequence, run.sequence + run.count)
            tokens = z[:, run.token : run.token + run.count * run.length]
            _of_padded(tokens, None, run.count, top[there], token[there])
            token[there] += run.token
    else:  # the lengths are on a GPU, for which the host doesn't wait
        index, kept = places(bounds, sequences.max_seqlen)
        largest, place = z[:, index].masked_fill_(~kept, -torch.inf).max(2)
        top.copy_(largest.t())
        token.copy_((place + bounds[:-1]).t())


def _of_padded(
    z: torch.Tensor,
    key_mask: torch.Tensor | None,
    count: int,
    top: torch.Tensor,
    token: torch.Tensor,
) -> None:
    """Fills top and token of sequences of one length."""
    z = z.unflatten(1, (count, -1))
    if key_mask is not None:
        z.masked_fill_(~key_mask, -torch.inf)
    largest, place = z.max(2)
    top.copy_(largest.t())
    token.copy_((place + torch.arange(count, device=z.device) * z.shape[2]).t())
