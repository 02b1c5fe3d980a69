"""attention by csrc/kernels/attention, on a GPU or for the host."""

from typing import Any

import torch
import torch.nn.functional as F

from ...packing.sequences import Sequences
from .. import native
from ..dropout import Dropout
from ..rows import aligned_rows
from . import limits
from .run import AnyHeads, Heads, Saved, parts
from .scores import Scores, put_line

_VECTOR = 8  # values in 16 bytes, which is how tiles are copied


def unsupported_reason(
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    size: limits.Size | None = None,
    features: tuple[str, ...] = (),
) -> str | None:
    reason = native.unsupported_reason(device)
    return reason or limits.unsupported_reason("cuda", dtype, head_dim, size, features)


def forward(
    heads: AnyHeads,
    sequences: Sequences,
    scores: Scores,
    dropout: Dropout,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out and, if it is given, lse. The last dimension of every tensor is dense."""
    module = native.module_for(out)
    heads, scores = _rotated(module, heads, sequences, scores)
    if module.attention_forward(heads, sequences, scores, dropout, out, lse):
        return
    copies = _Copies(module)
    heads = Heads(*map(copies.read, parts(heads)))
    written = copies.write(out)
    done = module.attention_forward(heads, sequences, scores, dropout, written, lse)
    copies.give_back(done)


def backward(
    dout: torch.Tensor,
    heads: AnyHeads,
    saved: Saved,
    sequences: Sequences,
    scores: Scores,
    dropout: Dropout,
    grads: AnyHeads,
    bias_grad: torch.Tensor | None,
) -> None:
    """Fills the gradients."""
    out, lse = saved
    if lse is None:
        raise AssertionError("the forward saved no lse for this backward")
    module = native.module_for(out)
    heads, scores = _rotated(module, heads, sequences, scores)
    # lse and delta of each row, from the first kernel to the second.
    statistics = lse.new_empty((*lse.shape, 2))
    rest = (sequences, scores, dropout)
    if module.attention_backward(dout, heads, saved, *rest, grads, statistics):
        _fill_bias_grad(module, (dout, heads), rest, statistics, bias_grad)
        return
    copies = _Copies(module)
    dout, saved = copies.read(dout), Saved(copies.read(out), lse)
    heads = Heads(*map(copies.read, parts(heads)))
    written = Heads(*map(copies.write, parts(grads)))
    done = module.attention_backward(dout, heads, saved, *rest, written, statistics)
    _fill_bias_grad(module, (dout, heads), rest, statistics, bias_grad)
    copies.give_back(done)


def _rotated(
    module: Any, heads: AnyHeads, sequences: Sequences, scores: Scores
) -> tuple[AnyHeads, Scores]:
    """Heads whose q and k are new tensors, rotated by their positions, and the scores with tables
    that kernels read 16 bytes at a time. Without rotary positions both as they are."""
    cos, sin = scores.cos, scores.sin
    if cos is None or sin is None:
        return heads, scores
    # Dense, so copied where they begin elsewhere.
    cos, sin = (aligned_rows(table.view(-1)).view(table.shape) for table in (cos, sin))
    scores = scores._replace(cos=cos, sin=sin)
    q, _, v = parts(heads)
    both = torch.empty(2, *q.shape, dtype=q.dtype, device=q.device)
    rotated = Heads(both[0], both[1], v)
    module.attention_rotate(heads, sequences, (cos, sin), (rotated.q, rotated.k))
    return rotated, scores


def _fill_bias_grad(
    module: Any,
    read: tuple[torch.Tensor, AnyHeads],
    rest: tuple[Sequences, Scores, Dropout],
    statistics: torch.Tensor,
    bias_grad: torch.Tensor | None,
) -> None:
    """The gradient of a bias, if it is wanted. statistics: as the backward has left them."""
    if bias_grad is None:
        return
    sequences, _, _ = rest
    if sequences.cu_seqlens is None:
        count, longest = read[0].shape[:2]
    else:
        count, longest = sequences.cu_seqlens.shape[0] - 1, sequences.max_seqlen
    shape = module.attention_bias_partial_shape(count, longest, bias_grad.shape[0])
    partial = statistics.new_zeros(shape)
    line = statistics.new_empty(shape[-2:])
    if not module.attention_backward_bias(*read, *rest, statistics, partial, line):
        raise AssertionError("a kernel didn't take heads that lie in whole vectors")
    put_line(line, bias_grad)


class _Copies:
    """Tensors of heads that a kernel can read and write, 16 bytes at a time, in place of those that
    don't lie so."""

    def __init__(self, module: Any) -> None:
        self.in_vectors = module.attention_in_vectors
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """x, or its values in whole vectors, with zeros up to the last one's end."""
        if self.in_vectors(x):
            return x
        other = _in_whole_vectors(x)
        return other.copy_(F.pad(x, (0, other.shape[-1] - x.shape[-1])))

    def write(self, x: torch.Tensor) -> torch.Tensor:
        """x, or a tensor of whole vectors whose values x gets at the end."""
        if self.in_vectors(x):
            return x
        other = _in_whole_vectors(x)
        self.written.append((other, x))
        return other

    def give_back(self, done: bool) -> None:
        if not done:
            raise AssertionError("a kernel didn't take heads that lie in whole vectors")
        for other, x in self.written:
            x.copy_(other[..., : x.shape[-1]])


def _in_whole_vectors(x: torch.Tensor) -> torch.Tensor:
    width = -(-x.shape[-1] // _VECTOR) * _VECTOR
    return torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
