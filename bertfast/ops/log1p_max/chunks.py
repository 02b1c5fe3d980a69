"""The largest product of each word and sequence, and its token, some words at a time.

    z = x weight^T,  top = max of z over a sequence's tokens,  token = its first place

Products are torch's. On a GPU 16-bit ones add up in float32; a CPU's round their results, so there
the operands are float32. Torch's max takes z by words, whose tokens then lie side by side; the
kernel takes it by tokens, whose rows all begin at a multiple of 16 bytes.
"""

import torch

from ...packing import Sequences
from .. import dispatch
from ..product import product
from . import limits, reference_top

OP = "linear_log1p_max"

# Of z: as linear_cross_entropy's chunks.
CHUNK_BYTES = 64 << 20
TIMES_ON_GPU = 5
LEAST_WORDS = 64


def top_and_token(
    x: torch.Tensor, weight: torch.Tensor, sequences: Sequences, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """top, in float32 or float64, and token, int32, numbered over the batch: both (sequences,
    vocabulary). Of a sequence without tokens -inf, and any token."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    by_kernels = backend != "torch"
    module = dispatch.backend_module(OP, backend) if by_kernels else reference_top
    cu_seqlens, vocabulary = sequences.cu_seqlens, weight.shape[0]
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    top = x.new_full((count, vocabulary), -torch.inf, dtype=compute)
    token = torch.zeros((count, vocabulary), dtype=torch.int32, device=x.device)
    rows = x.flatten(0, -2)
    if not len(rows) or not top.numel():
        return top, token
    rows = rows if x.is_cuda else rows.to(compute)
    step = min(
        chunk_words(len(rows), x.is_cuda), -(-vocabulary // limits.MULTIPLE) * limits.MULTIPLE
    )
    room = x.new_empty(len(rows) * step, dtype=compute)
    for first in range(0, vocabulary, step):
        part = slice(first, first + step)
        words = weight[part].to(rows.dtype)
        if by_kernels:
            z = room.view(-1, step)[:, : len(words)]
            product(rows, words.t(), z)
        else:
            z = room.view(step, -1)[: len(words)]
            product(words, rows.t(), z)
        module.forward(z, sequences, top[:, part], token[:, part])
    return top, token


def chunk_words(tokens: int, on_gpu: bool) -> int:
    """The most, a multiple of 16 bytes."""
    words = CHUNK_BYTES * (TIMES_ON_GPU if on_gpu else 1) // (4 * tokens)
    return max(LEAST_WORDS, words // limits.MULTIPLE * limits.MULTIPLE)
