"""An encoder layer as data flows through it.

    qkv = linear(x, p.qkv)
    ctx = attention(qkv)
    x   = linear_norm(ctx, p.out, residual=x, dropout)
    h   = linear_gelu(x, p.up)
    x   = linear_norm(h, p.down, residual=x, dropout)

`run_layer` is this for the modules of anybody's layer, given as `Parts`, in the pre-norm order too.
Each block, the first three lines or the last two, runs in one of two forms: as one autograd node
where all its modules may be read and kernels run it (attention_block.py, mlp_block.py), else by the
ops, which autograd composes (composed.py), or on a CPU by what these call (on_cpu.py).
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import tracing
from ..ops import dispatch
from ..ops.attention import limits
from ..ops.dropout import draw_seed
from ..ops.layer_norm.run import Norm
from ..ops.linear import run as linear_gelu
from ..ops.linear_gated import run as linear_gated
from ..packing.batch import Batch, Copies, Shared
from . import attention_block, mlp_block
from .attention_block import Given
from .composed import Composed
from .eligibility import Facts
from .joined import same_form
from .modules import Weights, untouched
from .on_cpu import OnCpu
from .parts import AFTER_ATTENTION, AFTER_MLP, ATTENTION, Call, Parts, Positions, Read, read

__all__ = ["Call", "Parts", "Positions", "for_layers", "run_layer"]


def run_layer(parts: Parts, x: torch.Tensor, call: Call) -> torch.Tensor:
    """x is (rows, length, width), or packed (1, tokens, width)."""
    now, place = read(parts, call.batch.clean), _place(x, call)
    if place is not None and place.device.type == "cpu" and call.backend in ("auto", "torch"):
        simple = _is_simple(parts, now, place, call.batch.clean)
        layer = OnCpu(parts, now, call, x) if simple else Composed(parts, now, call)
        place = None  # torch does the work
    else:
        layer = Composed(parts, now, call)
    if parts.norm_first:
        return layer.pre_norm(x) if place is None else _pre_norm(layer, place, x)
    if place is None:
        return layer.mlp_block(layer.attention_block(x))
    copies = call.batch.copies
    given = Given(x, None if copies is None else copies.take(x))
    attended = _attention_node(layer, place, given)
    if attended is None:
        attended = Given(layer.attention_block(x))
    made = _mlp_node(layer, place, attended)
    if made is None:
        return layer.mlp_block(attended.y)
    if copies is not None:
        copies.keep(made.y, made.copy, call.batch.clean)
    return made.y


class Place(NamedTuple):
    """The kind of tensors that a layer's nodes work on, and their sizes."""

    device: torch.device
    dtype: torch.dtype
    cast: torch.dtype | None  # of the products, under autocast
    rows: int
    length: int
    width: int

    @property
    def products(self) -> torch.dtype:
        return self.cast or self.dtype

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """True if all are ordinary tensors of this dtype and device."""
        return (
            tracing.are_plain(tensors)
            and set(map(_dtype, tensors)) == {self.dtype}
            and set(map(_device, tensors)) == {self.device}
        )


_dtype, _device = attrgetter("dtype"), attrgetter("device")


def _pre_norm(layer: Composed, place: Place, x: torch.Tensor) -> torch.Tensor:
    attended = _attention_node(layer, place, Given(x))
    if attended is None:
        sum_ = layer.attention_sum(x)
        attended = Given(layer.norm(layer.now.down_norm, sum_), z=sum_)
    made = _mlp_node(layer, place, attended)
    if made is not None:
        return made.y
    assert attended.z is not None
    return layer.mlp_sum(attended.z, attended.y)


def _place(x: torch.Tensor, call: Call) -> Place | None:
    """None where the ops have to compose the layer: something traces or transforms."""
    if tracing.only_reference() or not tracing.plain_call(x) or x.ndim != 3:
        return None
    device, dtype = x.device, x.dtype
    cast = tracing.autocast(x)
    if cast is not None and dtype != torch.float32:
        return None
    return Place(device, dtype, cast, *x.shape)


def _is_simple(parts: Parts, now: Read, place: Place, clean: bool) -> bool:
    """True if all modules may be read, nothing is dropped, and all tensors are of one kind."""
    linears = (*now.qkv, now.attention_output, *now.up, now.down)
    norms: tuple[Any, ...] = now.attention_norm, now.down_norm
    if parts.norm_first and untouched(parts.attention_norm, nn.Identity, clean):
        norms = norms[1:]  # after embeddings with a norm of their own
    drops = now.attention_output_dropout, now.activation_dropout, now.down_dropout
    return (
        set(map(type, linears)) == {Weights}
        and set(map(type, norms)) == {Norm}
        and drops == (0.0, 0.0, 0.0)
        and not parts.attention_dropout
        and place.cast is None
        and place.holds(_given(x for one in (*linears, *norms) for x in one[:2]))
    )


def _attention_node(layer: Composed, place: Place, given: Given) -> Given | None:
    """The attention block as one node; None where the ops have to compose it."""
    parts, now, call = layer.parts, layer.now, layer.call
    out, before = now.attention_output, now.attention_norm if parts.norm_first else None
    norm = now.attention_norm if before is None else now.down_norm
    drop, qkv = now.attention_output_dropout, now.qkv
    if type(out) is not Weights or type(norm) is not Norm or type(drop) is not float:
        return None
    if len(qkv) == 1 and type(qkv[0]) is Weights:
        weights, biases = qkv[0][:1], () if qkv[0].bias is None else qkv[0][1:]
    elif set(map(type, qkv)) == {Weights} and same_form(qkv):
        q, k, v = qkv
        weights = (q.weight, k.weight, v.weight)
        biases = () if q.bias is None else (q.bias, k.bias, v.bias)
    else:
        return None
    bias, positions = call.positions.distance_bias, call.positions
    if bias is not None:
        positions = positions._replace(distance_bias=None)
    if before is not None and type(before) is not Norm:
        return None
    first = () if before is None else before[:2]
    p = attention_block.Parameters(*out, norm.weight, norm.bias, bias, weights, biases, first)
    if not place.holds(_given((*p[:5], *weights, *biases, *first))):
        return None
    attention, norms = _attention_backends(layer, place)
    if attention == "torch" or norms == "torch":
        return None
    batch, drops, x = call.batch, layer.dropouts, given.y
    batch.check(x)
    node = attention_block.Call(
        *(batch.sequences, parts.heads, parts.scale, norm.eps),
        drops.of(x, parts.attention_dropout, ATTENTION),
        drops.of(x, drop, AFTER_ATTENTION, batch.index),
        *(call.joined, place.cast, attention, norms, positions),
        None if before is None else before.eps,
    )
    return attention_block.attention_block(node, given, p)


def _attention_backends(layer: Composed, place: Place) -> tuple[str, str]:
    """Those of attention and of layer_norm."""
    parts, call = layer.parts, layer.call
    rows, length, batch = place.rows, place.length, call.batch
    longest = length
    if batch.cu_seqlens is not None:
        length = limits.packed_length(length, batch.cu_seqlens.shape[0] - 1)
        longest = batch.max_seqlen
    size = limits.size_of(rows, parts.heads, length, batch.key_mask is not None, longest)
    head_dim = layer.now.attention_output.weight.shape[1] // parts.heads
    case = (place.device, place.products)
    asked = call.positions.features(longest)
    if asked and torch.is_grad_enabled():
        asked = (*asked, limits.BACKWARD)
    more = (asked,) if asked else ()
    attention = dispatch.choose("attention_qkv", call.backend, *case, head_dim, size, *more)
    return attention, dispatch.choose("layer_norm", call.backend, *case, place.width)


def _mlp_node(layer: Composed, place: Place, given: Given) -> Given | None:
    """The MLP block as one node; None where the ops have to compose it."""
    parts, now, call = layer.parts, layer.now, layer.call
    up, down, norm, drop = now.up, now.down, now.down_norm, now.down_dropout
    gated, joined = parts.gated, call.joined_up or call.joined
    activation = None if gated is None else gated.activation
    if (parts.approximate if gated is None else activation) is None:
        return None
    if now.activation_dropout != 0.0 or type(norm) is not Norm or type(drop) is not float:
        return None
    read_up = [part for part in up if type(part) is Weights]
    if len(read_up) < len(up) or (len(up) > 1 and not same_form(up)) or type(down) is not Weights:
        return None
    weights, biases = tuple(part.weight for part in read_up), _given(p.bias for p in read_up)
    last, last_bias = (None, None) if parts.norm_first else (norm.weight, norm.bias)
    p = mlp_block.Parameters(down.weight, down.bias, last, last_bias, weights, biases)
    if not place.holds(_given((*p[:4], *p.up, *biases))):
        return None
    case = (place.device, place.products)
    width, inner = p.down.shape
    choose = linear_gelu.choose if activation is None else linear_gated.choose
    sizes = (width, inner, place.rows * place.length)
    choice = choose(call.backend, *case, sizes, (width, inner))
    norms = dispatch.choose("layer_norm", call.backend, *case, place.width)
    if choice.after == "torch" or norms == "torch":
        return None
    before = norm if given.z is None or parts.norm_first else now.attention_norm
    node = mlp_block.Call(
        None if parts.norm_first else norm.eps,
        parts.approximate == "tanh",
        layer.dropouts.of(given.y, drop, AFTER_MLP, call.batch.index),
        *(place.cast, call.recompute, choice, norms, before.eps, activation, joined),
    )
    return mlp_block.mlp_block(node, given, before[:2], p)


def _given(tensors: Iterable[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def for_layers(batch: Batch, facts: Facts, device: torch.device) -> Batch:
    """The batch as a model hands it to its layers: with what is known of their modules, and with
    one seed for the dropouts of all. A layer that comes twice must draw anew each time, and so do
    all while something is traced."""
    if tracing.is_compiling():
        return batch
    trained = any(map(_training, facts.dropouts))
    seed = draw_seed(device) if trained and facts.numbers and _drop(facts.dropouts) else None
    known = dict(numbers=facts.numbers, clean=facts.clean, facts=facts)
    return batch.told(seed=seed, copies=Copies(), shared=Shared(), **known)


_training = attrgetter("training")


def _drop(modules: Iterable[nn.Module]) -> bool:
    """True if one of them drops values now."""
    shares = (m.p if hasattr(m, "p") else m.dropout for m in modules if m.training)
    return any(map(bool, shares))
