"""layer_norm's registered ops, which serve rms_norm too, and the autograd Function around them."""

from typing import Any

import torch

from ...tracing import plain_backward
from .. import derivatives
from ..derivatives import Context
from ..dropout import Dropout, restored
from ..registration import Op, empty, fast_apply, nothing
from . import run
from .run import Gradients, Kept, Norm, Saved, Wanted

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? x_bias, Tensor? seed, "
    "Tensor? row_index, float eps, bool rms, int threshold, int site, str backend"
)


def _run(kept: Kept, *arguments: Any) -> run.Outputs:
    x, weight, bias, residual, x_bias, seed, rows, eps, rms, threshold, site, backend = arguments
    drop = restored(seed, threshold, site, rows)
    return run.forward(x, Norm(weight, bias, eps, rms), x_bias, residual, drop, backend, kept)


def _given(outs: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(nothing(like) if out is None else out for out in outs)


def _infer(*arguments: Any) -> torch.Tensor:
    return _run(Kept(False), *arguments).y


def _forward(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    *given, with_sum = rest
    return _given(_run(Kept(True, with_sum), x, *given)[:4], x)


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    _, _, eps, rms, threshold, *_, with_sum = rest
    with_z = with_sum or run.saves_z(x, weight, residual, x_bias, threshold)
    norm = Norm(weight, bias, eps, rms)
    return _given(run.new_outputs(x, weight.dtype, norm, Kept(True), with_z)[:4], x)


def _backward(dy: torch.Tensor, dsum: torch.Tensor | None, *rest: Any) -> tuple[torch.Tensor, ...]:
    z, mean, rstd, weight, seed, row_index, threshold, site, *wanted, backend = rest
    drop = restored(seed, threshold, site, row_index)
    saved = Saved(z, mean, rstd)
    grads = run.backward(dy, dsum, saved, weight, drop, Wanted(*wanted), backend)
    return _given(grads, dy)


def _backward_fake(
    dy: torch.Tensor, dsum: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    _, _, _, weight, _, _, _, _, *wanted, _ = rest
    return _given(run.new_gradients(dy, weight, Wanted(*wanted)), dy)


infer = Op(f"layer_norm({_INPUTS}) -> Tensor", _infer, lambda x, weight, *_: empty(x, weight.dtype))
forward = Op(
    f"layer_norm_forward({_INPUTS}, bool with_sum) "
    "-> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
backward = Op(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor? z, Tensor? mean, Tensor? rstd, "
    "Tensor? weight, Tensor? seed, Tensor? row_index, int threshold, int site, bool want_dz, "
    "ScalarType? dx_dtype, bool want_params, bool want_x_bias, bool with_bias, str backend) "
    "-> (Tensor dz, Tensor dx, Tensor dweight, Tensor dbias, Tensor dx_bias)",
    _backward,
    _backward_fake,
    batched=True,
)


def backward_as_op(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    saved: Saved,
    weight: torch.Tensor | None,
    dropout: Dropout,
    wanted: Wanted,
    backend: str,
) -> Gradients:
    """run.backward by torch's dispatcher, for gradients that it alone can read, such as batches."""
    seed, threshold, _, site, rows = dropout
    given = (seed, rows, threshold, site, *wanted, backend)
    grads = backward.dispatched(dy, dsum, *saved, weight, *given)
    params = wanted.params, wanted.params and wanted.bias
    here = (wanted.dz, wanted.dx is not None, *params, wanted.x_bias)
    return Gradients(*(grad if want else None for grad, want in zip(grads, here, strict=True)))


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, *arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        *given, with_sum, plain = arguments
        y, z, mean, rstd = forward.call(plain)(*given, with_sum)
        x, weight, bias, _, _, seed, row_index, _, rms, threshold, site, backend = given
        # Without bias, dropout and residual z is x: nothing to write, the backward reads x.
        z = z if with_sum or z.numel() else x
        ctx.save_for_backward(z, None if rms else mean, rstd, weight, seed, row_index)
        ctx.constants = threshold, site, backend, x.dtype, bias is not None
        ctx.set_materialize_grads(False)
        # rstd is an output for what it is saved as: by it a second derivative finds x and residual,
        # which aren't saved.
        return y, z if with_sum else None, rstd

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context,
        saved: list[Any],
        dy: torch.Tensor | None,
        dsum: torch.Tensor | None,
        _: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        z, mean, rstd, weight, seed, row_index = saved
        threshold, site, backend, x_dtype, has_bias = ctx.constants
        need_x, need_weight, need_bias, need_residual, need_x_bias = ctx.needs_input_grad[:5]
        if dy is None:  # the sum alone was used, or nothing
            if dsum is None:
                return (None,) * 14
            dy = torch.zeros_like(dsum)
        # Without dropout dx is dz: computed once, returned twice.
        same = not threshold and x_dtype == weight.dtype
        plain = plain_backward(dy, z, weight) and (dsum is None or plain_backward(dsum))
        dz, dx, dweight, dbias, dx_bias = backward.call(plain)(
            *(dy, dsum, z, mean, rstd, weight, seed, row_index, threshold, site),
            need_residual or (need_x and same),
            x_dtype if need_x and not same else None,
            need_weight or need_bias,
            need_x_bias,
            has_bias,
            backend,
        )
        return (
            (dz if same else dx) if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            dz if need_residual else None,
            dx_bias if need_x_bias else None,
            *(None,) * 9,
        )


apply_plain = fast_apply(LayerNorm)
