"""The MLP block of a layer as one autograd node, its backward beside its forward. Post-norm:

    u = x Wu^T,  h = gelu(u + bu)                           dx = dz + du Wu
    y = LayerNorm(z),  z = dropout(d + bd) + x,  d = h Wd^T     dh = dd Wd

dz and dd come out of LayerNorm's backward: dd is dz through the dropout. The sum of x's two
gradients is made by the product that makes the second of them. Of a gated MLP u has two halves, and
h = act(u1 + bu1) * (u2 + bu2).

Pre-norm: the block before gives both its sum s and x, which is s normalised. y = dropout(d + bd) +
s is not; the gradients of s and x are two, which that block's backward adds.

Saved: u, h, z and LayerNorm's statistics; 9 units of tokens x width, 5 with `recompute`, which
makes h again. x is made again of what the attention block has saved of its own LayerNorm, if it ran
as a node; else it is saved. Pre-norm: u and h, and always s.
"""

from typing import Any, NamedTuple

import torch

from ..ops import derivatives
from ..ops.bias_gelu import run as bias_gelu
from ..ops.derivatives import Context
from ..ops.dropout import NO_DROPOUT, Dropout
from ..ops.gated import run as gated
from ..ops.layer_norm import registered as layer_norm_op
from ..ops.layer_norm import run as layer_norm
from ..ops.layer_norm.run import NOTHING_SAVED, Kept, Norm, Saved, Wanted
from ..ops.linear import registered as linear_gelu_op
from ..ops.linear import run as linear_gelu
from ..ops.linear_gated import registered as linear_gated_op
from ..ops.linear_gated import run as linear_gated
from ..ops.registration import any_requires_grad, fast_apply
from ..tracing import plain_backward
from . import products
from .attention_block import Given
from .joined import JoinedWeights


class Call(NamedTuple):
    """All that the block is told besides tensors with gradients."""

    eps: float | None  # None: pre-norm
    tanh: bool  # of the GELU
    dropout: Dropout
    cast: torch.dtype | None  # of the products, under autocast
    recompute: bool
    choice: linear_gelu.Choice  # of `up` and its activation, and of the gradient of both
    norm_backend: str
    eps_before: float  # of the LayerNorm before
    gated: str | None  # the activation of a gated MLP
    joined: JoinedWeights  # of its two products


class Parameters(NamedTuple):
    down: torch.Tensor
    down_bias: torch.Tensor | None
    norm: torch.Tensor | None  # None: pre-norm
    norm_bias: torch.Tensor | None
    up: tuple[torch.Tensor, ...]  # one weight, or of a gated MLP gate and up
    up_biases: tuple[torch.Tensor, ...]  # as many, or none


def mlp_block(
    call: Call, given: Given, norm_before: tuple[torch.Tensor, torch.Tensor | None], p: Parameters
) -> Given:
    """given: by the block before, at least its output. norm_before: weight and bias of its
    LayerNorm, if it gave more than that."""
    x, copy = given.y, given.copy
    if not any_requires_grad(x, given.z, *p[:4], *p.up, *p.up_biases):
        residual = x if call.eps is not None else given.z
        outs = _forward(call, x, residual, copy, p, save=False)[0]
        return Given(outs.y, outs.copy)
    made_of = () if given.z is None else (*given[2:], *norm_before)
    counts = len(p.up), len(p.up_biases)
    return Given(*_apply(call, counts, copy, x, *p[:4], *p.up, *p.up_biases, *made_of)[:2])


def _forward(
    call: Call,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    copy: torch.Tensor | None,
    p: Parameters,
    save: bool,
) -> tuple:
    # 1. up, with the activation
    up, up_bias = call.joined.of(p.up, p.up_biases)
    up, up_bias = products.rounded(up, call.cast), products.rounded(up_bias, call.cast)
    rows = products.rows(x, copy, call.cast)
    if call.gated is None:
        h, u = linear_gelu.forward(rows, up, up_bias, call.tanh, call.choice, save)
    else:
        h, u = linear_gated.forward(rows, up, up_bias, call.gated, call.choice, save)

    # 2. down, and what follows it
    down = products.rounded(p.down, call.cast)
    d = products.product(h, down, None).view(x.shape)
    if call.recompute:
        h = None
    norm = None
    if p.norm is not None and call.eps is not None:
        norm = Norm(p.norm, p.norm_bias, call.eps)
    keeps = Kept(save and norm is not None, copy=call.cast is not None and norm is not None)
    added = p.down_bias, residual
    outs = layer_norm.forward(d, norm, *added, call.dropout, call.norm_backend, keeps)
    if not save:
        return (outs,)
    # A concatenation isn't saved, but made again: `joined` may have had to make one.
    kept = up if call.cast is not None or len(p.up) == 1 else None
    return outs, rows, u, h, kept, up_bias, down


class _MlpBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        call: Call,
        counts: tuple[int, int],
        copy: torch.Tensor | None,
        x: torch.Tensor,
        *given: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        weights, biases = counts
        first = 4 + weights
        ups, up_biases, made_of = (
            given[4:first],
            given[first : first + biases],
            given[first + biases :],
        )
        down, down_bias, norm, norm_bias = given[:4]
        p = Parameters(down, down_bias, norm, norm_bias, ups, up_biases)
        residual = x if norm is not None else made_of[0]
        outs, rows, u, h, *made = _forward(call, x, residual, copy, p, save=True)
        # The parameters of joined weights are saved too, as in attention_block.py.
        joined = (*ups, *up_biases) if weights > 1 else ()
        ctx.save_for_backward(
            *(None if made_of else (x if call.cast is None else rows), u),
            *(h, *made),
            *(outs.z, outs.mean, outs.rstd, norm, norm_bias, *joined, *made_of),
        )
        ctx.call, ctx.shape, ctx.counts, ctx.joined = call, x.shape, counts, len(joined)
        bias = up_biases[0].dtype if up_biases else None
        ctx.dtypes = ups[0].dtype, bias, down.dtype
        ctx.set_materialize_grads(False)
        # rstd is an output for what it is saved as: by it a second derivative finds x.
        if outs.copy is not None:
            ctx.mark_non_differentiable(outs.copy)
        # Pre-norm nothing is normalised, and u is the output.
        return outs.y, outs.copy, u if norm is None else outs.rstd

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[Any], dy: torch.Tensor | None, *_: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        call, (weights, biases) = ctx.call, ctx.counts
        norm_backward, gelu_backward, gated_backward = (
            (layer_norm.backward, linear_gelu.backward, linear_gated.backward)
            if plain_backward(dy, *saved)
            else (
                *(layer_norm_op.backward_as_op, linear_gelu_op.backward_as_op),
                linear_gated_op.backward_as_op,
            )
        )
        rows, u, h, up, up_bias, down, z, mean, rstd, norm, norm_bias, *more = saved
        joined, made_of = more[: ctx.joined], more[ctx.joined :]
        ctx.maybe_clear_saved_tensors()
        saved.clear()
        need_x, need_down, need_down_bias, need_norm, need_norm_bias = ctx.needs_input_grad[3:8]
        needs_up = ctx.needs_input_grad[8 : 8 + weights + biases]
        need_z = any(ctx.needs_input_grad[8 + weights + biases :][:1])
        need_up, need_up_bias = any(needs_up[:weights]), any(needs_up[weights:])
        below_gelu = need_x or need_up or need_up_bias
        need_dd = below_gelu or need_down
        width = ctx.shape[-1]
        dup = dup_bias = ddown = dx = None

        # 1. LayerNorm, dropout and the bias of `down`
        same = not call.dropout.threshold and call.cast is None  # then dd is dz
        wanted_dd = down.dtype if need_dd and not same else None
        if norm is not None:
            dz, dd, dnorm, dnorm_bias, ddown_bias = norm_backward(
                *(dy, None, Saved(z, mean, rstd), norm, call.dropout),
                Wanted(
                    need_x or (same and need_dd),
                    wanted_dd,
                    need_norm or need_norm_bias,
                    need_down_bias,
                    norm_bias is not None,
                ),
                call.norm_backend,
            )
        else:
            dz, dd, dnorm, dnorm_bias, ddown_bias = dy, None, None, None, None
            if wanted_dd is not None or need_down_bias:
                _, dd, _, _, ddown_bias = norm_backward(
                    *(dy, None, NOTHING_SAVED, None, call.dropout),
                    Wanted(False, wanted_dd, False, need_down_bias),
                    call.norm_backend,
                )
        dresidual = dz
        del z, dy
        if need_dd:
            dd = (dz if same else dd).reshape(-1, width)

        # 2. the product down
        if need_down:
            if h is None:
                h = _activated_again(call, u, up_bias)
            ddown = products.weight_gradient(dd, h, ctx.dtypes[2])
        del h
        if below_gelu:
            # 3. the activation and its bias
            wanted = need_x or need_up, need_up_bias
            if call.gated is None:
                du, dup_bias = gelu_backward(dd, down, u, up_bias, call.tanh, wanted, call.choice)
            else:
                constants = call.gated, need_up_bias, call.choice
                du, dup_bias = gated_backward(dd, down, u, up_bias, *constants)
            del dd, u

            # 4. the product up, and the sum of x's gradients
            if need_up:
                if rows is None:
                    rows = _made_again(call, made_of, du.dtype)
                dup = products.weight_gradient(du, rows.view(-1, width), ctx.dtypes[0])
                del rows
            if need_x:
                if up is None:
                    up = call.joined.weight_of(tuple(joined[:weights]))
                if norm is not None:
                    dx = products.add_product(dz.view(-1, width), du, up).view(ctx.shape)
                else:
                    dx = (du @ up).to(dz.dtype).view(ctx.shape)
            if dup_bias is not None:
                dup_bias = dup_bias.to(ctx.dtypes[1])
        grads = (*products.parts(dup, weights), *products.parts(dup_bias, biases))
        return (
            *(None, None, None, dx, ddown, ddown_bias),
            dnorm if need_norm else None,
            dnorm_bias if need_norm_bias else None,
            *(g if n else None for g, n in zip(grads, needs_up, strict=True)),
            *((dresidual if norm is None and need_z else None,) if made_of else ()),
            *(None,) * (len(made_of) - 1),
        )


_apply = fast_apply(_MlpBlock)


def _activated_again(call: Call, u: torch.Tensor, up_bias: torch.Tensor | None) -> torch.Tensor:
    if call.gated is None:
        return bias_gelu.forward(u, up_bias, call.tanh, call.choice.after)
    return gated.forward(u, up_bias, call.gated, False, call.choice.after)


def _made_again(call: Call, made_of: list[torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
    """The block's input, by the LayerNorm before. Its z was rounded when it was saved."""
    z, _, _, weight, bias = made_of
    norm = Norm(weight, bias, call.eps_before)
    made = layer_norm.forward(z, norm, None, None, NO_DROPOUT, call.norm_backend, Kept(False))
    return products.rounded(made.y, dtype)
