"""bias_gelu's registered ops and the autograd Function around them."""

from typing import Any

import torch

from ...tracing import plain_backward
from .. import derivatives
from ..derivatives import Context
from ..registration import Op, empty, fast_apply, nothing
from . import run


def _given(grads: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(nothing(like) if grad is None else grad for grad in grads)


def _backward(dy: torch.Tensor, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return _given(run.backward(dy, x, *rest), x)


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    want_dx: bool,
    want_dbias: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    return _given(run.new_gradients(x, bias, want_dx, want_dbias), x)


forward = Op(
    "bias_gelu(Tensor x, Tensor? bias, bool tanh, str backend) -> Tensor",
    run.forward,
    lambda x, bias, *_: empty(x, x.dtype if bias is None else bias.dtype),
)
backward = Op(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool want_dx, "
    "bool want_dbias, str backend) -> (Tensor dx, Tensor dbias)",
    _backward,
    _backward_fake,
    batched=True,
)


def backward_as_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    want_dx: bool,
    want_dbias: bool,
    backend: str,
    *,
    in_place: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """run.backward by torch's dispatcher, for gradients that it alone can read, such as batches.
    An op writes to no input: in_place changes nothing."""
    dx, dbias = backward.dispatched(dy, x, bias, tanh, want_dx, want_dbias, backend)
    return dx if want_dx else None, dbias if want_dbias else None


class BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        tanh: bool,
        backend: str,
        plain: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, bias)
        ctx.constants = tanh, backend
        return forward.call(plain)(x, bias, tanh, backend)

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[torch.Tensor], dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, bias = saved
        tanh, backend = ctx.constants
        need_x, need_bias = ctx.needs_input_grad[:2]
        plain = plain_backward(dy, x, bias)
        dx, dbias = backward.call(plain)(dy, x, bias, tanh, need_x, need_bias, backend)
        return dx if need_x else None, dbias if need_bias else None, None, None, None


apply_plain = fast_apply(BiasGelu)
