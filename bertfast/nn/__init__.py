"""A BERT encoder layer as data flows through it, and encoders made of such layers.

    qkv = linear(x, Wqkv, bqkv)
    ctx = attention_qkv(qkv)
    x   = layer_norm(linear(ctx, Wo), x_bias=bo, residual=x, dropout)
    h   = bias_gelu(linear(x, W1), b1)
    x   = layer_norm(linear(h, W2), x_bias=b2, residual=x, dropout)

`run_layer` is this for the modules of anybody's layer, given as `Parts`, in the pre-norm order too.
EncoderLayer and Encoder are modules of our own, with the state_dict keys of Hugging Face's
BertEncoder.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .. import checks, ops
from ..ops import dispatch
from ..ops.bias_gelu import APPROXIMATE
from ..ops.dropout import draw_seed
from ..ops.linear import onednn as cpu_linear
from ..packing.batch import Batch
from ..packing.batch import pack as pack_batch
from ..tracing import can_look_at
from .linear import Weights, product, readable_linear, readable_norm, untouched
from .qkv import JoinedWeights, joined_product, same_form

ATTENTION, AFTER_ATTENTION, AFTER_MLP = range(3)  # the sites of a layer's dropouts


class Parts(NamedTuple):
    """The modules of a layer, whatever their names."""

    query: nn.Module | None
    key: nn.Module | None
    value: nn.Module | None
    attention_dropout: float  # as it applies now: 0 in eval
    attention_output: nn.Module | Weights
    attention_output_dropout: nn.Module | None
    attention_norm: nn.Module
    up: nn.Module
    activation: Callable
    approximate: str | None  # of the GELU that the activation is; None: another function
    down: nn.Module
    down_dropout: nn.Module | None
    down_norm: nn.Module
    heads: int
    scale: float
    qkv: Weights | None = None  # one product, where there are no three Linears
    activation_dropout: nn.Module | None = None
    norm_first: bool = False


def run_layer(
    parts: Parts,
    x: torch.Tensor,
    batch: Batch,
    joined: JoinedWeights | None,
    training: bool,
    backend: str = "auto",
) -> torch.Tensor:
    """x is (rows, length, width), or packed (1, tokens, width). training: the layer's own flag."""
    split = x.is_cuda or backend in ("triton", "cuda")  # else torch: it adds biases in the product
    seed = None
    if (
        parts.attention_dropout
        or _rate(parts.attention_output_dropout)
        or _rate(parts.down_dropout)
    ):
        seed = draw_seed(x.device)
    onednn = not split and backend == "auto" and cpu_linear.serves(x, training)
    run = _Run(batch, seed, split, onednn, backend)

    if parts.norm_first:
        context = run.attend(parts, run.norm(parts.attention_norm, x), joined)
        x = run.add(parts.attention_output, context, x, parts.attention_output_dropout)
        hidden = run.activate(parts, run.norm(parts.down_norm, x))
        return run.add(parts.down, hidden, x, parts.down_dropout)

    context = run.attend(parts, x, joined)
    x = run.add_and_norm(
        *(parts.attention_output, context, x, parts.attention_norm),
        *(parts.attention_output_dropout, AFTER_ATTENTION),
    )
    hidden = run.activate(parts, x)
    return run.add_and_norm(parts.down, hidden, x, parts.down_norm, parts.down_dropout, AFTER_MLP)


class _Run(NamedTuple):
    """What the steps of one layer's call share."""

    batch: Batch
    seed: torch.Tensor | None
    split: bool  # the kernels add biases
    onednn: bool  # the products do what follows them
    backend: str

    def attend(self, parts: Parts, x: torch.Tensor, joined: JoinedWeights | None) -> torch.Tensor:
        options = dict(
            **self.batch.layout(),
            dropout_p=parts.attention_dropout,
            seed=self.seed if parts.attention_dropout else None,
            site=ATTENTION,
            scale=parts.scale,
            backend=self.backend,
        )
        linears = parts.query, parts.key, parts.value
        if parts.qkv is not None:
            qkv = _by_head(self._call(parts.qkv, x), 3, parts.heads)
            context = ops.attention_qkv(self._tokens(qkv), **options)
        elif self.split and all(map(readable_linear, linears)) and same_form(linears):
            qkv = _by_head(joined_product(linears, x, joined), 3, parts.heads)
            context = ops.attention_qkv(self._tokens(qkv), **options)
        else:
            qkv = (_by_head(self._call(linear, x), parts.heads) for linear in linears)
            context = ops.attention(*map(self._tokens, qkv), **options)
        context = context.flatten(-2)
        return context[None] if self.batch.packed else context

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Without the leading 1 of a packed batch."""
        return x[0] if self.batch.packed else x

    def _call(self, linear: nn.Module | Weights, x: torch.Tensor) -> torch.Tensor:
        if self.onednn and readable_linear(linear):
            return cpu_linear.linear(x, linear.weight, linear.bias)
        return linear(x)

    def add_and_norm(self, linear, x, residual, norm, dropout, site) -> torch.Tensor:
        """norm(dropout(linear(x)) + residual)"""
        if readable_norm(norm) and (dropout is None or untouched(dropout, nn.Dropout)):
            p = _rate(dropout)
            if self.onednn and not p and readable_linear(linear):
                z = cpu_linear.linear_add(x, residual, linear.weight, linear.bias)
                return ops.layer_norm(z, norm.weight, _bias(norm), eps=norm.eps)
            x, bias = product(linear, x, self.split)
            return ops.layer_norm(
                x,
                norm.weight,
                _bias(norm),
                eps=norm.eps,
                residual=residual,
                x_bias=bias,
                dropout_p=p,
                seed=self.seed if p else None,
                site=site,
                row_index=self.batch.index if p else None,
                backend=self.backend,
            )
        x = linear(x)
        return norm((x if dropout is None else dropout(x)) + residual)

    def norm(self, norm, x) -> torch.Tensor:
        if not readable_norm(norm):
            return norm(x)
        return ops.layer_norm(x, norm.weight, _bias(norm), eps=norm.eps, backend=self.backend)

    def add(self, linear, x, residual, dropout) -> torch.Tensor:
        """residual + dropout(linear(x)), in torch: layer_norm, which could do it, returns only its
        norm, and here the sum itself is needed too."""
        if self.onednn and _is_off(dropout) and readable_linear(linear):
            return cpu_linear.linear_add(x, residual, linear.weight, linear.bias)
        x = linear(x)
        return residual + (x if dropout is None else dropout(x))

    def activate(self, parts: Parts, x: torch.Tensor) -> torch.Tensor:
        """activation_dropout(activation(up(x)))"""
        if parts.approximate is None:
            x = parts.activation(self._call(parts.up, x))
        elif self.onednn and readable_linear(parts.up):
            x = cpu_linear.linear_gelu(x, parts.up.weight, parts.up.bias, parts.approximate)
        else:
            x, bias = product(parts.up, x, self.split)
            x = ops.bias_gelu(x, bias, approximate=parts.approximate, backend=self.backend)
        return x if parts.activation_dropout is None else parts.activation_dropout(x)


def _by_head(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    """The last dimension as sizes and the rest: -1 can't be found where there are no rows."""
    return x.unflatten(-1, (*sizes, x.shape[-1] // math.prod(sizes)))


def _rate(dropout: nn.Module | None) -> float:
    """What a dropout drops now, if it is torch's; whatever else stands there is called."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def _is_off(dropout: nn.Module | None) -> bool:
    return dropout is None or (untouched(dropout, nn.Dropout) and not _rate(dropout))


def _bias(norm: nn.LayerNorm) -> torch.Tensor:
    return torch.zeros_like(norm.weight) if norm.bias is None else norm.bias


def bert_parts(layer: nn.Module) -> Parts:
    """The parts of a layer with the names of Hugging Face's BertLayer."""
    # By the dicts of modules, as attributes of a Module take three times as long.
    modules = layer._modules
    attention, intermediate = modules["attention"]._modules, modules["intermediate"]._modules
    attend, attended, output = attention["self"], attention["output"]._modules, modules["output"]
    inside, output = attend._modules, output._modules
    activation = intermediate.get("intermediate_act_fn")
    if activation is None:  # a plain function
        activation = modules["intermediate"].intermediate_act_fn
    return Parts(
        inside["query"],
        inside["key"],
        inside["value"],
        inside["dropout"].p if attend.training else 0.0,
        attended["dense"],
        attended["dropout"],
        attended["LayerNorm"],
        intermediate["dense"],
        activation,
        gelu_form(activation),
        output["dense"],
        output["dropout"],
        output["LayerNorm"],
        attend.num_attention_heads,
        attend.scaling,
    )


def gelu_form(activation: Callable) -> str | None:
    """ "none" for the exact GELU, "tanh" for its tanh form, None for any other function."""
    if isinstance(activation, nn.Module) and not untouched(activation, type(activation)):
        return None
    if type(activation) is nn.GELU:
        return activation.approximate
    if activation is nn.functional.gelu:
        return "none"
    if type(activation) is functools.partial:
        known = activation.func is nn.functional.gelu and not activation.args
        if not known or activation.keywords.keys() - {"approximate"}:
            return None
        form = activation.keywords.get("approximate", "none")
        return form if form in APPROXIMATE else None
    return _GELU_CLASSES.get((type(activation).__module__, type(activation).__name__))


# transformers' activations, by name, as this module works without transformers.
_GELU_CLASSES = {
    ("transformers.activations", name): form
    for name, form in (
        ("GELUActivation", "none"),
        ("GELUTanh", "tanh"),
        ("PytorchGELUTanh", "tanh"),
        ("NewGELUActivation", "tanh"),
        ("FastGELUActivation", "tanh"),
    )
}


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.num_attention_heads = heads
        self.scaling = (width // heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)


class _Output(nn.Module):
    def __init__(self, inner: int, width: int, eps: float, dropout: float):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)


class EncoderLayer(nn.Module):
    """A post-norm encoder layer with the state_dict keys of Hugging Face's BertLayer."""

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        *,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        eps: float = 1e-12,
        approximate: str = "none",
        backend: str = "auto",
    ):
        super().__init__()
        for name, size in (("width", width), ("heads", heads), ("inner", inner)):
            checks.check_int(name, size, 1)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads ({heads}), got {width}")
        checks.check_number("dropout", dropout, 0, 1)
        checks.check_number("attention_dropout", attention_dropout, 0, 1)
        checks.check_number("eps", eps, least=0)
        checks.check_choice("approximate", approximate, APPROXIMATE)
        checks.check_choice("backend", backend, dispatch.CHOICES)
        self.width = width
        self.attention = nn.Module()
        self.attention.self = _SelfAttention(width, heads, attention_dropout)
        self.attention.output = _Output(width, width, eps, dropout)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, inner)
        self.intermediate.intermediate_act_fn = nn.GELU(approximate)
        self.output = _Output(inner, width, eps, dropout)
        self.backend = backend
        attention = self.attention.self
        self._joined = JoinedWeights((attention.query, attention.key, attention.value))

    def forward(self, x: torch.Tensor, batch: Batch | None = None) -> torch.Tensor:
        _check_tokens(x, self.width)
        if batch is not None and not isinstance(batch, Batch):
            raise TypeError(
                f"batch must be a bertfast.packing.batch.Batch, got {checks.kind(batch)}"
            )
        batch = batch or Batch()
        return run_layer(bert_parts(self), x, batch, self._joined, self.training, self.backend)


class Encoder(nn.Module):
    """Layers after one another, with the state_dict keys of Hugging Face's BertEncoder.

    forward(x, mask): x (rows, length, width); mask, bool (rows, length), says which tokens are
    attended. With `packed`, padding is taken out before the first layer and comes back after the
    last, where it repeats its row's first token.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        inner: int,
        *,
        packed: bool = True,
        backend: str = "auto",
        **options,
    ):
        super().__init__()
        checks.check_int("layers", layers, 1)
        checks.check_bool("packed", packed)
        self.layer = nn.ModuleList(
            EncoderLayer(width, heads, inner, backend=backend, **options) for _ in range(layers)
        )
        self.width = width
        self.packed = packed
        self.backend = backend

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        _check_tokens(x, self.width)
        if mask is not None:
            checks.check_mask("mask", mask, x.shape[:2], None)
            if mask.device.type != "cpu":  # one on a CPU saves the wait for what it holds
                checks.check_place("mask", mask, x.device, "x")
        batch = layout(mask, self.packed, x.device, self.backend, not self.training)
        if batch.packed:
            x = batch.pack(x)
        for layer in self.layer:
            x = layer(x, batch)
        return batch.unpack(x) if batch.packed else x


def _check_tokens(x: torch.Tensor, width: int) -> None:
    checks.check_float("x", x)
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"x must have shape [rows, length, {width}], got {checks.shape(x)}")


def layout(
    mask: torch.Tensor | None,
    may_pack: bool,
    device: torch.device | None = None,
    backend: str = "auto",
    sort: bool = False,
    padding: torch.Tensor | None = None,
) -> Batch:
    """The batch of a mask, for tensors on `device`: packed if that is allowed, pays, and the mask's
    values can be looked at. sort and padding: as in `batch.pack`."""
    if mask is None:
        return Batch()
    if may_pack and can_look_at(mask):
        return pack_batch(mask, device, backend, sort, padding)
    return Batch(key_mask=mask if device is None else mask.to(device))
