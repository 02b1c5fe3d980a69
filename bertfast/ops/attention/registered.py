"""attention's registered ops, with fakes, and the autograd Functions around them.

One op each for inference, forward and backward, of three tensors and of one buffer. All six call
the same two functions of a backend.
"""

import torch

from .. import derivatives, dispatch
from ..rows import as_rows

_LAYOUT = "Tensor? key_mask, Tensor? cu_seqlens, Tensor? tiles, int tile, Tensor? seed, "
_REST = _LAYOUT + "SymInt max_seqlen, float scale, int threshold, int site, str backend"
_SAVED = "Tensor out, Tensor lse, "


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x with a dense last dimension, and offsets inside a tile that fit 32 bits."""
    if x.stride(-1) == 1 and x.stride(-3) < 2**22:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() keeps a size of 1's stride


def _layout(q, key_mask, cu_seqlens, tiles, tile, seed, max_seqlen, *constants):
    """A batch's layout as the kernels read it, which see no strides but those between the mask's
    rows. No sequence is longer than all of them."""
    if cu_seqlens is not None:
        cu_seqlens, max_seqlen = cu_seqlens.contiguous(), min(max_seqlen, q.shape[0])
        tiles = None if tiles is None else tiles.contiguous()
    return as_rows(key_mask), cu_seqlens, tiles, tile, seed, max_seqlen, *constants


def _new_out(q):
    # Spread out, as torch takes three times as long to read a torch.Size.
    return torch.empty(*q.shape, dtype=q.dtype, device=q.device)


def _new_lse(q):
    """(batch, heads, length), or packed (heads, tokens)."""
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _run_forward(q, k, v, rest, out, lse):
    *arguments, backend = rest
    if q.numel():
        module = dispatch.backend_module("attention", backend)
        module.forward(_dense(q), _dense(k), _dense(v), *_layout(q, *arguments), out, lse)


def _run_backward(dout, q, k, v, out, lse, rest, grads):
    *arguments, backend = rest
    if q.numel():
        module = dispatch.backend_module("attention", backend)
        tensors = (_dense(dout), _dense(q), _dense(k), _dense(v))
        module.backward(*tensors, out, lse, *_layout(q, *arguments), *grads)


# Three tensors.


def _infer_fake(q, k, v, *rest):
    return _new_out(q)


def infer_impl(q, k, v, *rest):
    out = _new_out(q)
    _run_forward(q, k, v, rest, out, None)
    return out


def _forward_fake(q, k, v, *rest):
    return _new_out(q), _new_lse(q)


def _forward_impl(q, k, v, *rest):
    out, lse = _forward_fake(q, k, v)
    _run_forward(q, k, v, rest, out, lse)
    return out, lse


def _backward_fake(dout, q, k, v, *rest):
    return _new_out(q), _new_out(q), _new_out(q)


def _backward_impl(dout, q, k, v, out, lse, *rest):
    grads = _backward_fake(dout, q, k, v)
    _run_backward(dout, q, k, v, out, lse, rest, grads)
    return grads


# One buffer.


def _infer_qkv_fake(qkv, *rest):
    shape = (*qkv.shape[:-3], *qkv.shape[-2:])
    return torch.empty(shape, dtype=qkv.dtype, device=qkv.device)


def infer_qkv_impl(qkv, *rest):
    return infer_impl(*qkv.unbind(-3), *rest)


def _forward_qkv_fake(qkv, *rest):
    return _forward_fake(*qkv.unbind(-3))


def _forward_qkv_impl(qkv, *rest):
    return _forward_impl(*qkv.unbind(-3), *rest)


def _backward_qkv_fake(dout, qkv, *rest):
    return torch.empty(*qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _backward_qkv_impl(dout, qkv, out, lse, *rest):
    dqkv = _backward_qkv_fake(dout, qkv)
    _run_backward(dout, *qkv.unbind(-3), out, lse, rest, dqkv.unbind(-3))
    return dqkv


_library = torch.library.Library("bertfast", "FRAGMENT")
_THREE = "Tensor q, Tensor k, Tensor v, "
for _name, _inputs, _outputs, _impl, _fake in (
    ("attention", _THREE, "Tensor", infer_impl, _infer_fake),
    (
        "attention_forward",
        _THREE,
        "(Tensor out, Tensor lse)",
        _forward_impl,
        _forward_fake,
    ),
    (
        "attention_backward",
        "Tensor dout, " + _THREE + _SAVED,
        "(Tensor dq, Tensor dk, Tensor dv)",
        _backward_impl,
        _backward_fake,
    ),
    ("attention_qkv", "Tensor qkv, ", "Tensor", infer_qkv_impl, _infer_qkv_fake),
    (
        "attention_qkv_forward",
        "Tensor qkv, ",
        "(Tensor out, Tensor lse)",
        _forward_qkv_impl,
        _forward_qkv_fake,
    ),
    (
        "attention_qkv_backward",
        "Tensor dout, Tensor qkv, " + _SAVED,
        "Tensor",
        _backward_qkv_impl,
        _backward_qkv_fake,
    ),
):
    _library.define(f"{_name}({_inputs}{_REST}) -> {_outputs}")
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _impl, _key)
    torch.library.register_fake(f"bertfast::{_name}", _fake, lib=_library)
for _name in ("attention_backward", "attention_qkv_backward"):
    derivatives.register_batched(_name, _library)

infer = torch.ops.bertfast.attention.default
_forward = torch.ops.bertfast.attention_forward.default
_backward = torch.ops.bertfast.attention_backward.default
infer_qkv = torch.ops.bertfast.attention_qkv.default
_forward_qkv = torch.ops.bertfast.attention_qkv_forward.default
_backward_qkv = torch.ops.bertfast.attention_qkv_backward.default


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_mask, cu_seqlens, tiles, tile, seed, *constants):
        *constants, plain = constants
        layout = (key_mask, cu_seqlens, tiles, tile, seed)
        out, lse = (_forward_impl if plain else _forward)(q, k, v, *layout, *constants)
        ctx.save_for_backward(q, k, v, out, lse, key_mask, cu_seqlens, tiles, seed)
        ctx.constants = (tile, *constants)
        return out

    @staticmethod
    @derivatives.first_only
    def backward(ctx, saved, dout):
        *saved, seed = saved
        tile, *constants = ctx.constants
        plain = dispatch.plain_backward(dout, *saved[:3])
        backward = _backward_impl if plain else _backward
        grads = backward(dout, *saved, tile, seed, *constants)
        wanted = ctx.needs_input_grad[:3]
        grads = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return (*grads, *(None,) * 11)


class AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, key_mask, cu_seqlens, tiles, tile, seed, *constants):
        *constants, plain = constants
        layout = (key_mask, cu_seqlens, tiles, tile, seed)
        out, lse = (_forward_qkv_impl if plain else _forward_qkv)(qkv, *layout, *constants)
        ctx.save_for_backward(qkv, out, lse, key_mask, cu_seqlens, tiles, seed)
        ctx.constants = (tile, *constants)
        return out

    @staticmethod
    @derivatives.first_only
    def backward(ctx, saved, dout):
        *saved, seed = saved
        tile, *constants = ctx.constants
        plain = dispatch.plain_backward(dout, saved[0])
        backward = _backward_qkv_impl if plain else _backward_qkv
        dqkv = backward(dout, *saved, tile, seed, *constants)
        return (dqkv, *(None,) * 11)


# apply without its Python wrapper, which only serves functorch and takes 3 us.
apply_plain = super(torch.autograd.Function, Attention).apply
apply_qkv_plain = super(torch.autograd.Function, AttentionQKV).apply
