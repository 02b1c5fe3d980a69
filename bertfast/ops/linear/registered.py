"""linear_gelu's registered ops and the autograd Function around them: the form in one kernel."""

from typing import Any

import torch

from ...tracing import plain_backward
from .. import derivatives
from ..bias_gelu import registered as bias_gelu
from ..derivatives import Context
from ..registration import Op, empty, fast_apply, nothing
from . import run


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    save: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    y, u = run.forward(rows, weight, bias, tanh, run.Choice(backend, backend), save)
    shape = (*x.shape[:-1], weight.shape[0])
    return y.view(shape), nothing(x) if u is None else u.view(shape)


def _forward_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, tanh: bool, save: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, empty(y) if save else nothing(x)


def _backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    want_dbias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    choice = run.Choice(backend, None, backend)
    dv, dbias = run.backward(dy, weight, u, bias, tanh, (True, want_dbias), choice)
    assert dv is not None
    return dv, nothing(u) if dbias is None else dbias


def backward_fake(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    form: Any,
    want_dbias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """form: of the activation."""
    return empty(u), nothing(u) if bias is None or not want_dbias else empty(bias)


forward = Op(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, bool tanh, bool save, str backend) -> "
    "(Tensor y, Tensor u)",
    _forward,
    _forward_fake,
)
backward = Op(
    "linear_gelu_backward(Tensor dy, Tensor weight, Tensor u, Tensor? bias, bool tanh, "
    "bool want_dbias, str backend) -> (Tensor dv, Tensor dbias)",
    _backward,
    backward_fake,
    batched=True,
)


def backward_as_op(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    wanted: tuple[bool, bool],
    choice: run.Choice,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """run.backward by torch's dispatcher, for gradients that it alone can read, such as batches."""
    if choice.backward is None:
        return bias_gelu.backward_as_op(dy @ weight, u, bias, tanh, *wanted, choice.after)
    dv, dbias = backward.dispatched(dy, weight, u, bias, tanh, wanted[1], choice.backward)
    return dv, dbias if wanted[1] else None


class LinearGelu(torch.autograd.Function):
    """y = gelu(u + bias), u = x weight^T: what is saved is x, weight, u and bias."""

    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tanh: bool,
        backend: str,
        plain: bool,
    ) -> torch.Tensor:
        y, u = forward.call(plain)(x, weight, bias, tanh, True, backend)
        ctx.save_for_backward(x, weight, bias, u)
        ctx.constants = tanh, backend
        return y

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[torch.Tensor], dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, u = saved
        tanh, backend = ctx.constants
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        plain = plain_backward(dy, x, weight, bias)
        backward = bias_gelu.backward.call(plain)
        dv, dbias = backward(dy, u, bias, tanh, need_x or need_weight, need_bias, backend)
        rows = dv.reshape(-1, dv.shape[-1]) if need_x or need_weight else dv
        return (
            dv @ weight if need_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            dbias if need_bias else None,
            *(None, None, None),
        )


apply_plain = fast_apply(LinearGelu)
