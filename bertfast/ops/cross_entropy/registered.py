"""linear_cross_entropy's autograd Function: the gradients are there when the forward is done."""

from typing import Any

import torch

from .. import derivatives
from ..derivatives import Context
from .chunks import Gradients, Wanted, losses_and_gradients


class LinearCrossEntropy(torch.autograd.Function):
    """The losses of rows, or their sum times `scale`. labels: -1 where a row doesn't count."""

    @staticmethod
    def forward(
        ctx: Context,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        smoothing: float,
        scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """scale: of the sum; None: the losses are not summed."""
        wanted = Wanted(*ctx.needs_input_grad[:3])
        losses, made = losses_and_gradients(hidden, weight, bias, labels, smoothing, scale, wanted)
        ctx.constants = smoothing, wanted, scale is None
        # The inputs are saved in either case: by them a second derivative is found, and refused.
        ctx.save_for_backward(hidden, weight, bias, labels, *made)
        return losses if scale is None else losses.sum() * scale

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[Any], dloss: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, *made = saved
        smoothing, wanted, apart = ctx.constants
        if apart:
            rows = dloss.contiguous()
            _, grads = losses_and_gradients(hidden, weight, bias, labels, smoothing, rows, wanted)
        else:
            grads = Gradients(*(None if g is None else g * dloss.to(g.dtype) for g in made))
        return *grads, None, None, None
