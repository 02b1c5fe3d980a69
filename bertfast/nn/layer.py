"""An encoder layer as data flows through it.

    qkv = linear(x, p.qkv)
    ctx = attention(qkv)
    x   = linear_norm(ctx, p.out, residual=x, dropout)
    h   = linear_gelu(x, p.up)
    x   = linear_norm(h, p.down, residual=x, dropout)

`run_layer` is this for the modules of anybody's layer, given as `Parts`, in the pre-norm order too.
Each block, the first three lines or the last two, runs in one of two forms: as one autograd node
where all its modules may be read and kernels run it (attention_block.py, mlp_block.py), else by the
ops, which autograd composes (composed.py).
"""

import dataclasses

import torch
from torch import nn

from .. import tracing
from ..ops import dispatch
from ..ops.attention import limits
from ..ops.dropout import draw_seed
from ..ops.layer_norm.run import Norm
from ..packing.batch import Batch
from . import attention_block, mlp_block
from .attention_block import Given
from .composed import Composed
from .eligibility import Facts
from .joined import same_form
from .modules import Weights
from .parts import AFTER_ATTENTION, AFTER_MLP, ATTENTION, Call, Parts, read

__all__ = ["Call", "Parts", "for_layers", "run_layer"]


def run_layer(parts: Parts, x: torch.Tensor, call: Call) -> torch.Tensor:
    """x is (rows, length, width), or packed (1, tokens, width)."""
    composed = Composed(parts, read(parts, call.batch.clean), call)
    if parts.norm_first:
        return composed.pre_norm(x)
    copies = call.batch.copies
    given = _attention_node(composed, Given(x, copies.take(x)))
    if given is None:
        given = Given(composed.attention_block(x))
    made = _mlp_node(composed, given)
    if made is None:
        return composed.mlp_block(given.y)
    copies.keep(made.y, made.copy, call.batch.clean)
    return made.y


def _attention_node(layer: Composed, given: Given) -> Given | None:
    """The attention block as one node; None where the ops have to compose it."""
    parts, now, call, x = layer.parts, layer.now, layer.call, given.y
    norm, out, drop = now.attention_norm, now.attention_output, now.attention_output_dropout
    if not (type(out) is Weights and type(norm) is Norm and type(drop) is float):
        return None
    if not all(type(linear) is Weights for linear in now.qkv) or not same_form(now.qkv):
        return None
    weights = tuple(linear.weight for linear in now.qkv)
    biases = () if now.qkv[0].bias is None else tuple(linear.bias for linear in now.qkv)
    p = attention_block.Parameters(*out, norm.weight, norm.bias, weights, biases)
    dtype = _products_dtype(x, *p[:4], *weights, *biases)
    if dtype is None:
        return None
    device, batch, width = x.device.type, call.batch, x.shape[-1]
    rows, length = x.shape[:2]
    if batch.packed:
        length = limits.packed_length(length, batch.cu_seqlens.shape[0] - 1)
    size = limits.unusual(rows, parts.heads, length, batch.key_mask is not None)
    case = (device, dtype, p.out.shape[1] // parts.heads, size)
    attention = dispatch.choose("attention_qkv", call.backend, *case)
    norms = dispatch.choose("layer_norm", call.backend, device, dtype, width)
    if "torch" in (attention, norms):
        return None
    batch.check(x)
    drops = layer.dropouts
    return attention_block.attention_block(
        attention_block.Call(
            sequences=batch.sequences,
            heads=parts.heads,
            scale=parts.scale,
            eps=norm.eps,
            attention_dropout=drops.of(x, parts.attention_dropout, ATTENTION),
            dropout=drops.of(x, drop, AFTER_ATTENTION, batch.index),
            joined=call.joined,
            cast=None if dtype == x.dtype else dtype,
            attention_backend=attention,
            norm_backend=norms,
        ),
        given,
        p,
    )


def _mlp_node(layer: Composed, given: Given) -> Given | None:
    """The MLP block as one node; None where the ops have to compose it."""
    parts, now, call = layer.parts, layer.now, layer.call
    norm, drop = now.down_norm, now.down_dropout
    if parts.approximate is None or now.activation_dropout != 0.0:
        return None
    if not (type(now.up) is type(now.down) is Weights and type(norm) is Norm):
        return None
    if type(drop) is not float:
        return None
    p = mlp_block.Parameters(*now.up, *now.down, norm.weight, norm.bias)
    x = given.y
    dtype = _products_dtype(x, *p)
    if dtype is None:
        return None
    device = x.device.type
    gelu = dispatch.choose("bias_gelu", call.backend, device, dtype)
    norms = dispatch.choose("layer_norm", call.backend, device, dtype, x.shape[-1])
    if "torch" in (gelu, norms):
        return None
    before = now.attention_norm if given.z is not None else norm
    return mlp_block.mlp_block(
        mlp_block.Call(
            eps=norm.eps,
            tanh=parts.approximate == "tanh",
            dropout=layer.dropouts.of(x, drop, AFTER_MLP, call.batch.index),
            cast=None if dtype == x.dtype else dtype,
            recompute=call.recompute,
            gelu_backend=gelu,
            norm_backend=norms,
            eps_before=before.eps,
        ),
        given,
        before[:2],
        p,
    )


def _products_dtype(x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.dtype | None:
    """The dtype in which a node makes its products; None if something keeps it from being a node:
    what traces or transforms, tensors of other kinds, dtypes or places."""
    if tracing.only_reference() or not tracing.plain_call(x, *parameters):
        return None
    if x.ndim != 3:
        return None
    dtype, device = x.dtype, x.device
    for parameter in parameters:
        if parameter is not None and (parameter.dtype != dtype or parameter.device != device):
            return None
    cast = tracing.autocast(x)
    if cast is None:
        return dtype
    return cast if dtype == torch.float32 else None


def for_layers(batch: Batch, facts: Facts, device: torch.device) -> Batch:
    """The batch as a model hands it to its layers: with what is known of their modules, and with
    one seed for the dropouts of all. A layer that comes twice must draw anew each time, and so do
    all while something is traced."""
    if tracing.is_compiling():
        return batch
    seed = draw_seed(device) if facts.numbers and any(map(_drops, facts.dropouts)) else None
    return dataclasses.replace(batch, seed=seed, numbers=facts.numbers, clean=facts.clean)


def _drops(module: nn.Module) -> bool:
    return module.training and bool(module.p if hasattr(module, "p") else module.dropout)
