"""The attention block of a layer as one autograd node, its backward beside its forward. Post-norm:

    qkv = x Wqkv^T + bqkv                                   dx = dz + dqkv Wqkv
    context = attention(qkv)                                dcontext = da Wo
    y = LayerNorm(z),  z = dropout(a + bo) + x,  a = context Wo^T

dz and da come out of LayerNorm's backward: da is dz through the dropout. The sum of x's two
gradients is made by the product that makes the second of them.

Pre-norm: n = LayerNorm(x) takes the place of x in the first line, and the last one's LayerNorm is
the MLP block's, which is given both y and the sum z. The two gradients of z, and those of x, are
added by the backward of the LayerNorm that each is normalised by.

Saved: x, qkv, context, z and the statistics of all kernels; 6 units of tokens x width. The next
block saves z too and makes y of it again, so y itself isn't kept (mlp_block.py); nor is n.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..ops import derivatives
from ..ops.attention import check
from ..ops.attention import registered as attention_op
from ..ops.attention import run as attention
from ..ops.attention.scores import Scores
from ..ops.derivatives import Context
from ..ops.dropout import NO_DROPOUT, Dropout
from ..ops.layer_norm import registered as layer_norm_op
from ..ops.layer_norm import run as layer_norm
from ..ops.layer_norm.run import Kept, Norm, Outputs, Saved, Wanted
from ..ops.registration import any_requires_grad, fast_apply
from ..packing.sequences import Sequences
from ..tracing import plain_backward
from . import products
from .joined import JoinedWeights
from .parts import NO_POSITIONS, Positions


class Call(NamedTuple):
    """All that the block is told besides tensors with gradients."""

    sequences: Sequences
    heads: int
    scale: float
    eps: float
    attention_dropout: Dropout
    dropout: Dropout
    joined: JoinedWeights
    cast: torch.dtype | None  # of the products, under autocast
    attention_backend: str
    norm_backend: str
    positions: Positions  # but for a bias, which has a gradient
    eps_before: float | None  # of a pre-norm layer's first LayerNorm


class Parameters(NamedTuple):
    out: torch.Tensor
    out_bias: torch.Tensor | None
    norm: torch.Tensor
    norm_bias: torch.Tensor | None
    distance_bias: torch.Tensor | None
    qkv: tuple[torch.Tensor, ...]  # one weight, or three
    qkv_biases: tuple[torch.Tensor, ...]  # as many, or none
    before: tuple[torch.Tensor | None, ...] = ()  # weight and bias of a pre-norm layer's first norm


class Given(NamedTuple):
    """The block's output, and what the next block takes in its stead for its backward."""

    y: torch.Tensor
    copy: torch.Tensor | None = None  # y as products read it under autocast
    z: torch.Tensor | None = None  # in a pre-norm layer with a gradient, and always there
    mean: torch.Tensor | None = None
    rstd: torch.Tensor | None = None


def attention_block(call: Call, given: Given, p: Parameters) -> Given:
    """given: x, (rows, length, width) or packed (1, tokens, width), and perhaps its copy."""
    x, copy = given.y, given.copy
    tensors = (x, *p[:5], *p.qkv, *p.qkv_biases, *p.before)
    if any_requires_grad(*tensors):
        return Given(*_apply(call, (len(p.qkv), len(p.qkv_biases)), copy, *tensors))
    outs = _forward(call, x, copy, p, save=False)[0]
    return Given(outs.y, outs.copy, outs.z)


def _forward(
    call: Call, x: torch.Tensor, copy: torch.Tensor | None, p: Parameters, save: bool
) -> tuple:
    # 1. q, k and v of each token, in one tensor
    first = None
    if call.eps_before is not None:
        first = _first_norm(call, x, p.before, save)
    rows = products.rows(x if first is None else first.y, copy, call.cast)
    weight, bias = call.joined.of(p.qkv, p.qkv_biases)
    weight, bias = products.rounded(weight, call.cast), products.rounded(bias, call.cast)
    qkv = products.product(rows, weight, bias)
    places = x.shape[1:2] if call.sequences.cu_seqlens is not None else x.shape[:2]
    qkv = qkv.view(*places, 3, call.heads, weight.shape[0] // (3 * call.heads))

    # 2. attention
    scores = _scores(call, qkv, p.distance_bias)
    context, lse = attention.forward(
        *(qkv, call.sequences, scores, call.attention_dropout, call.attention_backend, save)
    )

    # 3. the output's product, and what follows it
    out = products.rounded(p.out, call.cast)
    a = products.product(context.view(-1, out.shape[1]), out, None).view(x.shape)
    norm = Norm(p.norm, p.norm_bias, call.eps)
    cast = call.cast is not None
    kept = Kept(save, sum=first is not None, copy=cast)
    outs = layer_norm.forward(a, norm, p.out_bias, x, call.dropout, call.norm_backend, kept)
    return outs, first, rows, qkv, context, lse, out, weight if cast else None


def _first_norm(
    call: Call,
    x: torch.Tensor,
    before: Sequence[torch.Tensor | None],
    save: bool = False,
) -> Outputs:
    """n of a pre-norm layer."""
    weight, bias = before
    assert weight is not None and call.eps_before is not None
    norm = Norm(weight, bias, call.eps_before)
    return layer_norm.forward(x, norm, None, None, NO_DROPOUT, call.norm_backend, Kept(save))


def _scores(call: Call, qkv: torch.Tensor, distance_bias: torch.Tensor | None) -> Scores:
    positions = call.positions
    if positions is NO_POSITIONS and distance_bias is None:
        return Scores(call.scale)
    longest = call.sequences.max_seqlen
    if call.sequences.cu_seqlens is None:
        longest = qkv.shape[1]
    given = positions.rotary, positions.window, distance_bias
    return check.check_scores("qkv", qkv, longest, call.scale, *given)


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        call: Call,
        counts: tuple[int, int],
        copy: torch.Tensor | None,
        x: torch.Tensor,
        out: torch.Tensor,
        out_bias: torch.Tensor | None,
        norm: torch.Tensor,
        norm_bias: torch.Tensor | None,
        distance_bias: torch.Tensor | None,
        *qkv: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        count, parameters = counts[0], sum(counts)
        rest = qkv[:count], qkv[count:parameters], qkv[parameters:]
        p = Parameters(out, out_bias, norm, norm_bias, distance_bias, *rest)
        outs, first, rows, *saved = _forward(call, x, copy, p, save=True)
        # The parameters are saved too: torch then notices one that changed before the backward,
        # which it can't by the joined weights, as each of all these counts its own changes.
        kept = x if call.cast is None or first is not None else rows
        statistics = () if first is None else (first.mean, first.rstd)
        ctx.save_for_backward(
            *(kept, outs.z, outs.mean, outs.rstd, norm, norm_bias),
            *(*saved, distance_bias, *qkv, *statistics),
        )
        ctx.call, ctx.counts = call, counts
        ctx.shape, ctx.dtype = x.shape, out.dtype
        aside = [outs.mean] if first is not None else [outs.mean, outs.z]
        ctx.mark_non_differentiable(*aside, *(() if outs.copy is None else (outs.copy,)))
        ctx.set_materialize_grads(False)
        # rstd is an output for what it is saved as, here and in the next block: by it a second
        # derivative finds what z was made of.
        return outs.y, outs.copy, outs.z, outs.mean, outs.rstd

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context,
        saved: list[Any],
        dy: torch.Tensor | None,
        _: torch.Tensor | None,
        dsum: torch.Tensor | None,
        *__: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            if dsum is None:
                return (None,) * len(ctx.needs_input_grad)
            dy = torch.zeros_like(dsum)
        call, (count, bias_count) = ctx.call, ctx.counts
        norm_backward, attention_backward = (
            (layer_norm.backward, attention.backward)
            if plain_backward(dy, *saved) and (dsum is None or plain_backward(dsum))
            else (layer_norm_op.backward_as_op, attention_op.backward_as_op)
        )
        x, z, mean, rstd, norm, norm_bias, qkv, context, lse, out, rounded, bias, *parameters = (
            saved
        )
        ctx.maybe_clear_saved_tensors()
        saved.clear()
        need_x, need_out, need_out_bias, need_norm, need_norm_bias = ctx.needs_input_grad[3:8]
        need_distances, *needs = ctx.needs_input_grad[8:]
        after = count + bias_count
        need_weights, need_biases = any(needs[:count]), any(needs[count:after])
        need_before = any(needs[after:])
        below = need_x or need_distances or need_weights or need_biases or need_before
        width, outputs = ctx.shape[-1], math.prod(qkv.shape[-3:])
        dout = dqkv = ddistances = dweights = dbiases = dx = None

        # 1. LayerNorm, dropout and the output's bias
        same = not call.dropout.threshold and call.cast is None  # then da is dz
        need_da = below or need_out
        dz, da, dnorm, dnorm_bias, dout_bias = norm_backward(
            *(dy, dsum, Saved(z, mean, rstd), norm, call.dropout),
            Wanted(
                need_x or (same and need_da),
                out.dtype if need_da and not same else None,
                need_norm or need_norm_bias,
                need_out_bias,
                norm_bias is not None,
            ),
            call.norm_backend,
        )
        del z, dy, dsum
        da = dz if same else da

        # 2. the output's product
        if need_da:
            da = da.view(-1, width)
        if need_out:
            dout = products.weight_gradient(da, context.view(da.shape[0], -1), ctx.dtype)
        if below:
            dcontext = (da @ out).view(context.shape)
            del da

            # 3. attention
            scores, kept = _scores(call, qkv, bias), attention.Saved(context, lse)
            dqkv, ddistances = attention_backward(
                *(dcontext, qkv, kept, call.sequences, scores),
                *(call.attention_dropout, call.attention_backend, need_distances),
            )
            del qkv, context, lse, kept, dcontext
            dqkv = dqkv.view(-1, outputs)

        # 4. the first product, what comes before it, and the sum of x's gradients
        *before, first_mean, first_rstd = parameters[count + bias_count :] or (None,) * 4
        if need_weights:
            n = x if call.eps_before is None else _first_norm(call, x, before).y
            n = products.rounded(n, dqkv.dtype).view(-1, width)
            dweights = products.weight_gradient(dqkv, n, parameters[0].dtype)
            del n
        if need_biases:
            dbiases = dqkv.sum(0, dtype=parameters[count].dtype)
        if rounded is None and (need_x or need_before):
            rounded = call.joined.weight_of(tuple(parameters[:count]))
        dbefore: tuple[torch.Tensor | None, ...] = ()
        if call.eps_before is None:
            if need_x:
                dx = products.add_product(dz.view(-1, width), dqkv, rounded).view(ctx.shape)
        elif need_x or need_before:
            dn = (dqkv @ rounded).to(x.dtype).view(ctx.shape)
            del dqkv
            dx, _, *dbefore, _ = norm_backward(
                *(dn, dz if need_x else None, Saved(x, first_mean, first_rstd), before[0]),
                *(NO_DROPOUT, Wanted(need_x, None, need_before, False, before[1] is not None)),
                call.norm_backend,
            )
        else:
            dbefore = None, None
        grads = *products.parts(dweights, count), *products.parts(dbiases, bias_count), *dbefore
        return (
            *(None, None, None, dx, dout, dout_bias),
            dnorm if need_norm else None,
            dnorm_bias if need_norm_bias else None,
            ddistances,
            *(g if n else None for g, n in zip(grads, needs, strict=False)),
        )


_apply = fast_apply(_AttentionBlock)
