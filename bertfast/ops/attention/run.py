"""Attention's calls of a backend: new tensors for what it writes, and what it reads made dense.

q, k and v are three tensors, or one that has all three of them in its dimension -3; so are their
gradients. Padded tensors are (batch, length, heads, head_dim), packed ones (tokens, heads,
head_dim).
"""

from typing import NamedTuple, TypeAlias, TypeVar

import torch

from ...packing.planning import plan
from ...packing.sequences import Sequences
from .. import dispatch
from ..dropout import Dropout
from ..registration import empty
from . import limits
from .scores import Scores, dense


class Heads(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


AnyHeads: TypeAlias = "Heads | torch.Tensor"
Form = TypeVar("Form", Heads, torch.Tensor)


def parts(heads: AnyHeads) -> Heads:
    """q, k and v as three tensors."""
    return Heads(*heads.unbind(-3)) if isinstance(heads, torch.Tensor) else heads


class Saved(NamedTuple):
    """The output, and of each of its rows the logarithm to base 2 of the sum of its weights."""

    out: torch.Tensor
    lse: torch.Tensor | None


def forward(
    heads: AnyHeads,
    sequences: Sequences,
    scores: Scores,
    dropout: Dropout,
    backend: str,
    save: bool,
) -> Saved:
    """save: lse is wanted, for a backward."""
    saved = new_saved(heads, sequences.cu_seqlens is not None, save)
    if saved.out.numel():
        module = dispatch.backend_module("attention", backend)
        sequences = _in_few_programs(sequences, saved.out)
        module.forward(_dense_heads(heads), sequences, dense(scores), dropout, *saved)
    return saved


def backward(
    dout: torch.Tensor,
    heads: Form,
    saved: Saved,
    sequences: Sequences,
    scores: Scores,
    dropout: Dropout,
    backend: str,
    want_bias: bool = False,
) -> tuple[Form, torch.Tensor | None]:
    """The gradients of q, k and v, in the form of `heads`, and of the scores' bias, if wanted."""
    grads = new_like(heads)
    bias = None if scores.bias is None or not want_bias else empty(scores.bias)
    if bias is not None and not dout.numel():
        bias.zero_()
    if dout.numel():
        module = dispatch.backend_module("attention", backend)
        sequences = _in_few_programs(sequences, dout)
        rest = (sequences, dense(scores), dropout, grads, bias)
        module.backward(_dense(dout), _dense_heads(heads), saved, *rest)
    return grads, bias


def new_saved(heads: AnyHeads, packed: bool, save: bool) -> Saved:
    if isinstance(heads, torch.Tensor):
        *places, _, count, head_dim = heads.shape
        x = heads
    else:
        x = heads.q
        *places, count, head_dim = x.shape
    out = torch.empty(*places, count, head_dim, dtype=x.dtype, device=x.device)
    if not save:
        return Saved(out, None)
    shape = (count, places[0]) if packed else (places[0], count, places[1])
    return Saved(out, torch.empty(shape, dtype=torch.float32, device=x.device))


def new_like(heads: Form) -> Form:
    return empty(heads) if isinstance(heads, torch.Tensor) else Heads(*map(empty, heads))


def _in_few_programs(sequences: Sequences, out: torch.Tensor) -> Sequences:
    """A packed batch with a plan of its own where CUDA couldn't start the programs of as many tiles
    in each sequence as the longest has, or of a plan with room for that."""
    cu_seqlens, longest = sequences.cu_seqlens, sequences.max_seqlen
    if cu_seqlens is None:
        return sequences
    if sequences.tiles is None:
        room = (cu_seqlens.shape[0] - 1) * (longest + 128)
    else:
        room = sequences.tiles.shape[0] * sequences.tile
    if room * out.shape[-2] <= limits.MAX_POSITIONS:
        return sequences
    made = plan(cu_seqlens, longest, out.shape[0])
    return sequences._replace(tiles=made.tiles, tile=made.tile)


def _dense_heads(heads: AnyHeads) -> AnyHeads:
    return _dense(heads, -4) if isinstance(heads, torch.Tensor) else Heads(*map(_dense, heads))


def _dense(x: torch.Tensor, token: int = -3) -> torch.Tensor:
    """x with a dense last dimension, and offsets inside a tile that fit 32 bits. token: the
    dimension in which tokens follow each other."""
    if x.stride(-1) == 1 and x.stride(token) < 2**22:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() keeps a size of 1's stride
