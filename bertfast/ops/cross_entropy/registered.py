"""linear_cross_entropy's autograd Function: the gradients are there when the forward is done."""

from typing import Any

import torch

from ...tracing import is_batched
from .. import derivatives
from ..derivatives import Context
from .chunks import NOTHING, Gradients, Wanted, losses_and_gradients


class LinearCrossEntropy(torch.autograd.Function):
    """The losses of rows, or their sum. labels: -1 where a row doesn't count."""

    @staticmethod
    def forward(
        ctx: Context,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        smoothing: float,
        apart: bool,
        backend: str,
    ) -> torch.Tensor:
        """apart: the losses are not summed."""
        wanted = Wanted(*ctx.needs_input_grad[:3])
        now = NOTHING if apart else wanted
        losses, made = losses_and_gradients(
            hidden, weight, bias, labels, smoothing, None, now, backend
        )
        ctx.constants = smoothing, wanted, apart, backend
        # The inputs are saved in either case: by them a second derivative is found, and refused.
        ctx.save_for_backward(hidden, weight, bias, labels, *made)
        return losses if apart else losses.sum()

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[Any], dloss: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, dhidden, dweight, dbias = saved
        smoothing, wanted, apart, backend = ctx.constants
        grads = Gradients(dhidden, dweight, dbias)
        if apart:
            if is_batched(dloss):  # a kernel reads memory, and can't see a batch
                raise RuntimeError(
                    "linear_cross_entropy with reduction='none' has no batched gradients "
                    "(is_grads_batched=True): ask for one after the other, or reduce the losses"
                )
            scale = dloss.contiguous()
            _, grads = losses_and_gradients(
                hidden, weight, bias, labels, smoothing, scale, wanted, backend
            )
        found: list[torch.Tensor | None] = []
        for grad, given in zip(grads, (hidden, weight, bias), strict=True):
            if grad is not None:
                # The sum's, unrounded: what the loss is divided by comes now.
                grad = grad.to(given.dtype) if apart else _times(grad, dloss, given.dtype)
            found.append(grad)
        return *found, None, None, None, None


def _times(grad: torch.Tensor, dloss: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The product, rounded once; in one pass, but for a batch of gradients."""
    if grad.dtype == dtype or is_batched(dloss):
        return (grad * dloss).to(dtype)
    return torch.mul(grad, dloss, out=torch.empty_like(grad, dtype=dtype))
