"""attention's registered ops and the autograd Functions around them.

One op each for inference, forward and backward, of three tensors and of one buffer. All six call
the two functions of run.py.
"""

from typing import Any

import torch

from ...packing.sequences import Sequences
from ...packing.sequences import restored as restored_sequences
from ...tracing import plain_backward
from .. import derivatives
from ..derivatives import Context
from ..dropout import Dropout
from ..dropout import restored as restored_dropout
from ..registration import Op, empty, fast_apply, nothing
from . import run
from .run import Heads, Saved
from .scores import NO_LIMIT, Scores
from .scores import restored as restored_scores

_REST = (
    "Tensor? key_mask, Tensor? cu_seqlens, Tensor? tiles, int tile, Tensor? seed, "
    "SymInt max_seqlen, float scale, int threshold, int site, str backend, "
    "Tensor? cos=None, Tensor? sin=None, Tensor? bias=None, "
    f"int left={NO_LIMIT}, int right={NO_LIMIT}"
)
_WANT_BIAS = "bool want_bias=False"
_THREE = "Tensor q, Tensor k, Tensor v"
_FORWARD = "(Tensor out, Tensor lse)"


def _types(q: torch.Tensor, rest: tuple) -> tuple[Sequences, Scores, Dropout, str]:
    """sequences, scores, dropout and backend of an op's last arguments."""
    key_mask, cu_seqlens, tiles, tile, seed, max_seqlen, scale, threshold, site, backend = rest[:10]
    sequences = restored_sequences(key_mask, cu_seqlens, tiles, tile, max_seqlen, q.shape[0])
    scores = restored_scores(scale, rest[10:15])
    return sequences, scores, restored_dropout(seed, threshold, site), backend


def _wants_bias(rest: tuple) -> bool:
    """The last of a backward's arguments. The dispatcher leaves out what is the default."""
    return len(rest) > 15 and rest[15]


def _new_bias(dout: torch.Tensor, rest: tuple) -> torch.Tensor:
    return empty(rest[12]) if _wants_bias(rest) else nothing(dout)


# Three tensors.


def _infer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> torch.Tensor:
    return run.forward(Heads(q, k, v), *_types(q, rest), False).out


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> Saved:
    return run.forward(Heads(q, k, v), *_types(q, rest), True)


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: object,
) -> tuple[torch.Tensor, ...]:
    types, want_bias = _types(q, rest), _wants_bias(rest)
    grads, bias = run.backward(dout, Heads(q, k, v), Saved(out, lse), *types, want_bias)
    return (*grads, nothing(dout) if bias is None else bias)


# One buffer.


def _infer_qkv(qkv: torch.Tensor, *rest: object) -> torch.Tensor:
    return run.forward(qkv, *_types(qkv, rest), False).out


def _forward_qkv(qkv: torch.Tensor, *rest: object) -> Saved:
    return run.forward(qkv, *_types(qkv, rest), True)


def _backward_qkv(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, ...]:
    types, want_bias = _types(qkv, rest), _wants_bias(rest)
    grad, bias = run.backward(dout, qkv, Saved(out, lse), *types, want_bias)
    return grad, nothing(dout) if bias is None else bias


def _new(q: torch.Tensor) -> Saved:
    return run.new_saved(Heads(q, q, q), q.ndim == 3, True)


def _new_qkv(qkv: torch.Tensor) -> Saved:
    return run.new_saved(qkv, qkv.ndim == 4, True)


infer = Op(f"attention({_THREE}, {_REST}) -> Tensor", _infer, lambda q, *_: empty(q))
forward = Op(f"attention_forward({_THREE}, {_REST}) -> {_FORWARD}", _forward, lambda q, *_: _new(q))
backward = Op(
    f"attention_backward(Tensor dout, {_THREE}, Tensor out, Tensor lse, {_REST}, {_WANT_BIAS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    _backward,
    lambda dout, q, k, v, out, lse, *rest: (
        *(empty(q), empty(k), empty(v)),
        _new_bias(dout, rest),
    ),
    batched=True,
)
infer_qkv = Op(
    f"attention_qkv(Tensor qkv, {_REST}) -> Tensor", _infer_qkv, lambda qkv, *_: _new_qkv(qkv).out
)
forward_qkv = Op(
    f"attention_qkv_forward(Tensor qkv, {_REST}) -> {_FORWARD}",
    _forward_qkv,
    lambda qkv, *_: _new_qkv(qkv),
)
backward_qkv = Op(
    f"attention_qkv_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_REST}, "
    f"{_WANT_BIAS}) -> (Tensor dqkv, Tensor dbias)",
    _backward_qkv,
    lambda dout, qkv, out, lse, *rest: (empty(qkv), _new_bias(dout, rest)),
    batched=True,
)


def backward_as_op(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    saved: Saved,
    sequences: Sequences,
    scores: Scores,
    dropout: Dropout,
    backend: str,
    want_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """run.backward of one buffer by torch's dispatcher, for gradients that it alone can read, such
    as batches."""
    key_mask, cu_seqlens, max_seqlen, tiles, tile, _ = sequences
    layout = (key_mask, cu_seqlens, tiles, tile, dropout.seed, max_seqlen)
    numbers = (scores.scale, dropout.threshold, dropout.site)
    more = (*scores.parts, True) if want_bias else scores.parts
    dqkv, dbias = backward_qkv.dispatched(dout, qkv, *saved, *layout, *numbers, backend, *more)
    return dqkv, dbias if want_bias else None


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        tiles: torch.Tensor | None,
        tile: int,
        seed: torch.Tensor | None,
        *rest: Any,
    ) -> torch.Tensor:
        *constants, plain = rest
        layout = (key_mask, cu_seqlens, tiles, tile, seed)
        out, lse = forward.call(plain)(q, k, v, *layout, *constants)
        tables = _keep(ctx, tile, constants)
        ctx.save_for_backward(q, k, v, out, lse, key_mask, cu_seqlens, tiles, seed, *tables)
        return out

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[torch.Tensor | None], dout: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        plain = plain_backward(dout, *saved[:3], *saved[9:])
        grads = backward.call(plain)(dout, *saved[:8], *_kept(ctx, saved[8:]))
        return _wanted(ctx, grads)


class AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        qkv: torch.Tensor,
        key_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        tiles: torch.Tensor | None,
        tile: int,
        seed: torch.Tensor | None,
        *rest: Any,
    ) -> torch.Tensor:
        *constants, plain = rest
        layout = (key_mask, cu_seqlens, tiles, tile, seed)
        out, lse = forward_qkv.call(plain)(qkv, *layout, *constants)
        tables = _keep(ctx, tile, constants)
        ctx.save_for_backward(qkv, out, lse, key_mask, cu_seqlens, tiles, seed, *tables)
        return out

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[torch.Tensor | None], dout: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        plain = plain_backward(dout, saved[0], *saved[7:])
        grads = backward_qkv.call(plain)(dout, *saved[:6], *_kept(ctx, saved[6:]))
        return _wanted(ctx, grads)


def _keep(ctx: Context, tile: int, constants: list[Any]) -> list[torch.Tensor | None]:
    """Keeps all constants but scores' tensors, which are to be saved with the others."""
    ctx.tile, ctx.numbers, ctx.window = tile, constants[:5], constants[8:]
    return constants[5:8]


def _kept(ctx: Context, saved: list[torch.Tensor | None]) -> tuple:
    """A backward's last arguments, of what was saved last: the seed and scores' tensors."""
    seed, *tables = saved
    want_bias = (ctx.needs_input_grad[-4],) if tables else ()
    return (ctx.tile, seed, *ctx.numbers, *tables, *ctx.window, *want_bias)


def _wanted(ctx: Context, grads: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
    """For each argument of forward its gradient or None. Scores' bias is the fourth but last."""
    *heads, bias = grads
    needs = ctx.needs_input_grad
    found: list[torch.Tensor | None] = [None] * len(needs)
    for place, grad in enumerate(heads):
        if needs[place]:
            found[place] = grad
    if needs[-4]:
        found[-4] = bias
    return tuple(found)


apply_plain = fast_apply(Attention)
apply_qkv_plain = fast_apply(AttentionQKV)
