"""layer_norm's registered ops and the autograd Function around them."""

from typing import Any

import torch

from ...tracing import plain_backward
from .. import derivatives
from ..derivatives import Context
from ..dropout import Dropout, restored
from ..registration import Op, empty, fast_apply, nothing
from . import run
from .run import Gradients, Norm, Wanted

_INPUTS = (
    "Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor? x_bias, Tensor? seed, "
    "Tensor? row_index, float eps, int threshold, int site, str backend"
)


def _run(save: bool, *arguments: Any) -> run.Outputs:
    x, weight, bias, residual, x_bias, seed, row_index, eps, threshold, site, backend = arguments
    drop = restored(seed, threshold, site, row_index)
    return run.forward(x, Norm(weight, bias, eps), x_bias, residual, drop, backend, save)


def _given(outs: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(nothing(like) if out is None else out for out in outs)


def _infer(*arguments: Any) -> torch.Tensor:
    return _run(False, *arguments).y


def _forward(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return _given(_run(True, x, *rest)[:4], x)


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    threshold = rest[3]
    with_z = run.saves_z(x, weight, residual, x_bias, threshold)
    return _given(run.new_outputs(x, weight, True, with_z)[:4], x)


def _backward(dy: torch.Tensor, z: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    mean, rstd, weight, seed, row_index, threshold, site, *wanted, backend = rest
    drop = restored(seed, threshold, site, row_index)
    grads = run.backward(dy, z, mean, rstd, weight, drop, Wanted(*wanted), backend)
    return _given(grads, weight)


def _backward_fake(dy: torch.Tensor, z: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    _, _, weight, _, _, _, _, *wanted, _ = rest
    grads = run.new_gradients(dy, weight, Wanted(*wanted))
    return _given(grads, weight)


infer = Op(f"layer_norm({_INPUTS}) -> Tensor", _infer, lambda x, weight, *_: empty(x, weight.dtype))
forward = Op(
    f"layer_norm_forward({_INPUTS}) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
backward = Op(
    "layer_norm_backward(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor? seed, Tensor? row_index, int threshold, int site, bool want_dz, "
    "ScalarType? dx_dtype, bool want_params, bool want_x_bias, str backend) "
    "-> (Tensor dz, Tensor dx, Tensor dweight, Tensor dbias, Tensor dx_bias)",
    _backward,
    _backward_fake,
    batched=True,
)


def backward_as_op(
    dy: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout: Dropout,
    wanted: Wanted,
    backend: str,
) -> Gradients:
    """run.backward by torch's dispatcher, for gradients that it alone can read, such as batches."""
    seed, threshold, _, site, rows = dropout
    given = (seed, rows, threshold, site, *wanted, backend)
    grads = backward.dispatched(dy, z, mean, rstd, weight, *given)
    here = (wanted.dz, wanted.dx is not None, wanted.params, wanted.params, wanted.x_bias)
    return Gradients(*(grad if want else None for grad, want in zip(grads, here, strict=True)))


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *given, plain = arguments
        y, z, mean, rstd = forward.call(plain)(*given)
        x, weight, _, _, _, seed, row_index, _, threshold, site, backend = given
        # Without bias, dropout and residual z is x: nothing to write, the backward reads x.
        z = z if z.numel() else x
        ctx.save_for_backward(z, mean, rstd, weight, seed, row_index)
        ctx.constants = threshold, site, backend, x.dtype
        ctx.set_materialize_grads(False)
        # rstd is an output for what it is saved as: by it a second derivative finds x and residual,
        # which aren't saved.
        return y, rstd

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[Any], dy: torch.Tensor | None, _: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 12
        z, mean, rstd, weight, seed, row_index = saved
        threshold, site, backend, x_dtype = ctx.constants
        need_x, need_weight, need_bias, need_residual, need_x_bias = ctx.needs_input_grad[:5]
        # Without dropout dx is dz: computed once, returned twice.
        same = not threshold and x_dtype == weight.dtype
        plain = plain_backward(dy, z, weight)
        dz, dx, dweight, dbias, dx_bias = backward.call(plain)(
            *(dy, z, mean, rstd, weight, seed, row_index, threshold, site),
            need_residual or (need_x and same),
            x_dtype if need_x and not same else None,
            need_weight or need_bias,
            need_x_bias,
            backend,
        )
        return (
            (dz if same else dx) if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            dz if need_residual else None,
            dx_bias if need_x_bias else None,
            *(None,) * 7,
        )


apply_plain = fast_apply(LayerNorm)
