"""gated's registered ops and the autograd Function around them."""

from typing import Any

import torch

from ...tracing import plain_backward
from .. import derivatives
from ..derivatives import Context
from ..registration import Op, fast_apply, nothing
from . import run


def _given(
    dx: torch.Tensor, dbias: torch.Tensor | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return dx, nothing(x) if dbias is None else dbias


def _backward(dy: torch.Tensor, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _given(*run.backward(dy, x, *rest), x)


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    second: bool,
    want_dbias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _given(*run.new_gradients(x, bias, want_dbias), x)


forward = Op(
    "gated(Tensor x, Tensor? bias, str activation, bool second, str backend) -> Tensor",
    run.forward,
    lambda x, *_: run.new_output(x),
)
backward = Op(
    "gated_backward(Tensor dy, Tensor x, Tensor? bias, str activation, bool second, "
    "bool want_dbias, str backend) -> (Tensor dx, Tensor dbias)",
    _backward,
    _backward_fake,
    batched=True,
)


def backward_as_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    second: bool,
    want_dbias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """run.backward by torch's dispatcher, for gradients that it alone can read, such as batches."""
    dx, dbias = backward.dispatched(dy, x, bias, activation, second, want_dbias, backend)
    return dx, dbias if want_dbias else None


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str,
        second: bool,
        backend: str,
        plain: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, bias)
        ctx.constants = activation, second, backend
        return forward.call(plain)(x, bias, activation, second, backend)

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[torch.Tensor], dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, bias = saved
        activation, second, backend = ctx.constants
        need_x, need_bias = ctx.needs_input_grad[:2]
        plain = plain_backward(dy, x, bias)
        dx, dbias = backward.call(plain)(dy, x, bias, activation, second, need_bias, backend)
        gradients = dx if need_x else None, dbias if need_bias else None
        return *gradients, None, None, None, None


apply_plain = fast_apply(Gated)
