"""linear_gated's registered ops and the autograd Function around them: the form in one kernel."""

from typing import Any

import torch

from ...tracing import plain_backward
from .. import derivatives
from ..derivatives import Context
from ..gated import registered as gated
from ..linear.registered import backward_fake
from ..registration import Op, fast_apply, nothing
from . import run


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    save: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, wide = x.reshape(-1, x.shape[-1]), weight.shape[0]
    y, u = run.forward(rows, weight, bias, activation, run.Choice(backend, backend), save)
    lead = x.shape[:-1]
    return y.view(*lead, wide // 2), nothing(x) if u is None else u.view(*lead, wide)


def _forward_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, activation: str, save: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    lead, wide = x.shape[:-1], weight.shape[0]
    return x.new_empty((*lead, wide // 2)), x.new_empty((*lead, wide)) if save else nothing(x)


def _backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    want_dbias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    choice = run.Choice(backend, None, backend)
    du, dbias = run.backward(dy, weight, u, bias, activation, want_dbias, choice)
    return du, nothing(u) if dbias is None else dbias


forward = Op(
    "linear_gated(Tensor x, Tensor weight, Tensor? bias, str activation, bool save, str backend) "
    "-> (Tensor y, Tensor u)",
    _forward,
    _forward_fake,
)
backward = Op(
    "linear_gated_backward(Tensor dy, Tensor weight, Tensor u, Tensor? bias, str activation, "
    "bool want_dbias, str backend) -> (Tensor du, Tensor dbias)",
    _backward,
    backward_fake,
    batched=True,
)


def backward_as_op(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    want_dbias: bool,
    choice: run.Choice,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """run.backward by torch's dispatcher, for gradients that it alone can read, such as batches."""
    if choice.backward is None:
        constants = activation, False, want_dbias, choice.after
        return gated.backward_as_op(dy @ weight, u, bias, *constants)
    given = dy, weight, u, bias, activation, want_dbias, choice.backward
    du, dbias = backward.dispatched(*given)
    return du, dbias if want_dbias else None


class LinearGated(torch.autograd.Function):
    """y = act(g) * v of the halves of u + bias, u = x weight^T: x, weight, u and bias are saved."""

    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str,
        backend: str,
        plain: bool,
    ) -> torch.Tensor:
        y, u = forward.call(plain)(x, weight, bias, activation, True, backend)
        ctx.save_for_backward(x, weight, bias, u)
        ctx.constants = activation, backend
        return y

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[torch.Tensor], dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, u = saved
        activation, backend = ctx.constants
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        backward = gated.backward.call(plain_backward(dy, x, weight, bias))
        du, dbias = backward(dy, u, bias, activation, False, need_bias, backend)
        rows = du.reshape(-1, du.shape[-1])
        return (
            du @ weight if need_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            dbias if need_bias else None,
            *(None, None, None),
        )


apply_plain = fast_apply(LinearGated)
