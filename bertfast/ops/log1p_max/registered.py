"""linear_log1p_max's autograd Function, and the gradients through the largest products' tokens.

    dlogit = dy / (1 + top) where top > 0,                  one for each word and sequence
    dweight[word] = sum over sequences of dlogit x[token],  dbias = sum over sequences of dlogit
    dx[token] = sum of dlogit weight[word] over the words whose token it is

So all is sums of weighted rows, and of tokens x words nothing is made. For dx the words are sorted
by their tokens. torch's embedding_bag takes a bag's rows one after the other: the same bits each
run. Sums are float32 (float64 stays so) and rounded once.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...packing import Sequences
from ...tracing import is_batched, on_host
from .. import derivatives
from ..derivatives import Context
from .chunks import top_and_token


def largest_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sequences: Sequences,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each sequence and word, 0 where none is positive; and their tokens."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        top, token = top_and_token(x, weight, sequences, backend)
        if bias is not None:
            top += bias
        return top.relu_(), token


def vector(top: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.log1p(top.detach()).to(dtype)


class Entries(NamedTuple):
    """The words and sequences through which a gradient goes, word by word."""

    word: torch.Tensor
    token: torch.Tensor
    dlogit: torch.Tensor

    def by_token(self) -> "Entries":
        order = torch.sort(self.token, stable=True).indices
        return Entries(*(column[order] for column in self))


def entries(token: torch.Tensor, dlogit: torch.Tensor) -> Entries:
    """Of (vocabulary, sequences). Those that aren't 0 where the host can know; else all."""
    sequences = max(1, token.shape[1])
    if on_host(dlogit):
        place = dlogit.flatten().nonzero().squeeze(1)
        return Entries(place // sequences, token.flatten()[place].long(), dlogit.flatten()[place])
    word = torch.arange(token.numel(), device=token.device) // sequences
    return Entries(word, token.flatten().long(), dlogit.flatten())


def sums_of_rows(
    rows: torch.Tensor, row: torch.Tensor, factor: torch.Tensor, bag: torch.Tensor, bags: int
) -> torch.Tensor:
    """For each bag the sum of factor * rows[row] over its entries; bag grows."""
    if not bags or not len(rows):
        return factor.new_zeros((bags, rows.shape[1]))
    begins = torch.searchsorted(bag, torch.arange(bags, device=bag.device))
    rows = rows.to(factor.dtype)
    return F.embedding_bag(row, rows, begins, mode="sum", per_sample_weights=factor)


class LinearLog1pMax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sequences: Sequences,
        backend: str,
    ) -> torch.Tensor:
        top, token = largest_logits(x, weight, bias, sequences, backend)
        # bias is saved for second derivatives alone, which find it by that and are refused.
        ctx.save_for_backward(x, weight, bias, top, token)
        return vector(top, x.dtype)

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[Any], dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        if is_batched(dy):  # the host looks at memory, and can't see a batch
            raise RuntimeError(
                "linear_log1p_max has no batched gradients (is_grads_batched=True): "
                "ask for one after the other"
            )
        x, weight, bias, top, token = saved
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        with torch.autocast(x.device.type, enabled=False):
            dlogit = torch.where(top == 0, 0, dy.to(top.dtype) / (1 + top))
            dx = dweight = dbias = None
            if need_x or need_weight:
                found = entries(token.t(), dlogit.t())
            if need_weight:
                tokens = x.flatten(0, -2)
                dweight = sums_of_rows(
                    tokens, found.token, found.dlogit, found.word, len(weight)
                ).to(weight.dtype)
            if need_x:
                found = found.by_token()
                tokens = x.shape[:-1].numel()
                dx = sums_of_rows(weight, found.word, found.dlogit, found.token, tokens)
                dx = dx.to(x.dtype).view(x.shape)
            if need_bias:
                dbias = dlogit.sum(0).to(bias.dtype)
        return dx, dweight, dbias, None, None
