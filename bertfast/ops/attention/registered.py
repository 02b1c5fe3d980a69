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
from ..registration import Op, empty, fast_apply
from . import run
from .run import Heads, Saved

_REST = (
    "Tensor? key_mask, Tensor? cu_seqlens, Tensor? tiles, int tile, Tensor? seed, "
    "SymInt max_seqlen, float scale, int threshold, int site, str backend"
)
_THREE = "Tensor q, Tensor k, Tensor v"
_FORWARD = "(Tensor out, Tensor lse)"


def _types(q: torch.Tensor, rest: tuple) -> tuple[Sequences, float, Dropout, str]:
    """sequences, scale, dropout and backend of an op's last arguments."""
    key_mask, cu_seqlens, tiles, tile, seed, max_seqlen, scale, threshold, site, backend = rest
    sequences = restored_sequences(key_mask, cu_seqlens, tiles, tile, max_seqlen, q.shape[0])
    return sequences, scale, restored_dropout(seed, threshold, site), backend


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
) -> Heads:
    return run.backward(dout, Heads(q, k, v), Saved(out, lse), *_types(q, rest))


# One buffer.


def _infer_qkv(qkv: torch.Tensor, *rest: object) -> torch.Tensor:
    return run.forward(qkv, *_types(qkv, rest), False).out


def _forward_qkv(qkv: torch.Tensor, *rest: object) -> Saved:
    return run.forward(qkv, *_types(qkv, rest), True)


def _backward_qkv(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *rest: object
) -> torch.Tensor:
    return run.backward(dout, qkv, Saved(out, lse), *_types(qkv, rest))


def _new(q: torch.Tensor) -> Saved:
    return run.new_saved(Heads(q, q, q), q.ndim == 3, True)


def _new_qkv(qkv: torch.Tensor) -> Saved:
    return run.new_saved(qkv, qkv.ndim == 4, True)


infer = Op(f"attention({_THREE}, {_REST}) -> Tensor", _infer, lambda q, *_: empty(q))
forward = Op(f"attention_forward({_THREE}, {_REST}) -> {_FORWARD}", _forward, lambda q, *_: _new(q))
backward = Op(
    f"attention_backward(Tensor dout, {_THREE}, Tensor out, Tensor lse, {_REST}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    lambda dout, q, k, v, *_: Heads(empty(q), empty(k), empty(v)),
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
    f"attention_qkv_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_REST}) -> Tensor",
    _backward_qkv,
    lambda dout, qkv, *_: empty(qkv),
    batched=True,
)


def backward_as_op(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    saved: Saved,
    sequences: Sequences,
    scale: float,
    dropout: Dropout,
    backend: str,
) -> torch.Tensor:
    """run.backward of one buffer by torch's dispatcher, for gradients that it alone can read, such
    as batches."""
    key_mask, cu_seqlens, max_seqlen, tiles, tile, _ = sequences
    layout = (key_mask, cu_seqlens, tiles, tile, dropout.seed, max_seqlen)
    numbers = (scale, dropout.threshold, dropout.site)
    return backward_qkv.dispatched(dout, qkv, *saved, *layout, *numbers, backend)


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
        ctx.save_for_backward(q, k, v, out, lse, key_mask, cu_seqlens, tiles, seed)
        ctx.constants = (tile, *constants)
        return out

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[torch.Tensor | None], dout: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        *saved, seed = saved
        tile, *constants = ctx.constants
        plain = plain_backward(dout, *saved[:3])
        grads = backward.call(plain)(dout, *saved, tile, seed, *constants)
        wanted = ctx.needs_input_grad[:3]
        grads = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return (*grads, *(None,) * 11)


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
        ctx.save_for_backward(qkv, out, lse, key_mask, cu_seqlens, tiles, seed)
        ctx.constants = (tile, *constants)
        return out

    @staticmethod
    @derivatives.first_only
    def backward(
        ctx: Context, saved: list[torch.Tensor | None], dout: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        *saved, seed = saved
        tile, *constants = ctx.constants
        plain = plain_backward(dout, saved[0])
        dqkv = backward_qkv.call(plain)(dout, *saved, tile, seed, *constants)
        return (dqkv, *(None,) * 11)


apply_plain = fast_apply(Attention)
apply_qkv_plain = fast_apply(AttentionQKV)
