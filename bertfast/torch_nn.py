"""torch.nn.TransformerEncoder and TransformerEncoderLayer, their classes swapped.

A layer is `run_layer` over its own modules. What that doesn't do (a src_mask, a padding mask of
other numbers than 0 and -Inf, a hook inside the layer, ...) runs as torch does in training. torch's
fast path of eval is never taken: it reads a finite padding mask as a bool one, a tanh GELU as the
exact one, and ignores is_causal without a mask.

The encoder decides once how the batch lies and tells its layers. Packed: the padding is taken out
before the first layer and comes back as zeros after the last, as in torch's own eval. Hooks on a
layer see what they always saw: then each layer takes the padded batch and gives it back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import packing, tracing
from .graphs import GRAPHS, Graphs
from .nn.bert import gelu_form
from .nn.eligibility import Facts, facts_of, layer_facts
from .nn.hooks import has_user_hooks, sees_layout
from .nn.joined import JoinedWeights
from .nn.layer import Call, for_layers, run_layer
from .nn.modules import Weights, has_own_forward, is_spread, plain
from .nn.parts import Parts
from .nn.per_token import why_rows_are_seen
from .notice import warn_once
from .packing.batch import Batch, Buckets, full, layout
from .settings import ATTRIBUTE, KEPT, is_converted, is_disabled

_NOTHING_JOINED = JoinedWeights()  # q, k and v are one weight already


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    _original = nn.TransformerEncoderLayer

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        *,
        bertfast_batch: Batch | None = None,
    ) -> torch.Tensor:
        """bertfast_batch: how src lies, from a converted encoder. It is an argument, and not kept
        somewhere, so that a checkpointed layer that is run again is told the same."""
        if bertfast_batch is not None:
            return self._fused(src, bertfast_batch)
        if is_disabled() or not is_converted(self):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        entered: Entered | str | None
        if src_mask is not None or is_causal:
            entered = "src_mask or is_causal was given"
        else:
            entered = self.why_not()
        if entered is None:
            entered = enter(src, src_key_padding_mask, self.self_attn.batch_first, may_pack=False)
        if isinstance(entered, Entered):
            return entered.leave(self._fused(entered.x, entered.batch))
        warn_once(f"runs the original code of a TransformerEncoderLayer: {entered}")
        if src.is_nested:  # nothing but torch's fast path does this, or it says why it can't
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        return self._as_in_training(src, src_mask, src_key_padding_mask, is_causal)

    def _fused(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        settings = self.__dict__[ATTRIBUTE]
        call = Call(
            *(batch, _NOTHING_JOINED, self.training),
            *(settings.backend, settings.recompute, id(self)),
        )
        return run_layer(self.parts(), x, call)

    def _as_in_training(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor:
        if is_causal and src_mask is None:
            raise RuntimeError("src_mask must be given with is_causal=True, a hint about it")
        masks = _added(src_mask, src.dtype), _added(key_padding_mask, src.dtype)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    def parts(self) -> Parts:
        attention = self.self_attn
        return Parts(
            query=None,
            key=None,
            value=None,
            qkv=Weights(attention.in_proj_weight, attention.in_proj_bias),
            attention_dropout=attention.dropout if attention.training else 0.0,
            # As in torch: its values are read, the module is never called.
            attention_output=Weights(attention.out_proj.weight, attention.out_proj.bias),
            attention_output_dropout=self.dropout1,
            attention_norm=self.norm1,
            up=self.linear1,
            activation=self.activation,
            approximate=gelu_form(self.activation),
            activation_dropout=self.dropout,
            down=self.linear2,
            down_dropout=self.dropout2,
            down_norm=self.norm2,
            heads=attention.num_heads,
            scale=attention.head_dim**-0.5,
            norm_first=self.norm_first,
        )

    def why_not(self) -> str | None:
        """Why this layer runs as torch does in training, whatever the call; None if it needn't."""
        attention = self.self_attn
        if type(attention) is not nn.MultiheadAttention:
            return f"its self_attn is a {type(attention).__name__}, not a plain MultiheadAttention"
        for kind in (nn.TransformerEncoderLayer, nn.MultiheadAttention):
            if not has_own_forward(kind):
                return f"the forward of {kind.__name__} was replaced"
        if not attention._qkv_same_embed_dim:
            return "its keys or values have a width of their own (kdim, vdim)"
        if attention.bias_k is not None or attention.bias_v is not None:
            return "its self_attn has add_bias_kv"
        if attention.add_zero_attn:
            return "its self_attn has add_zero_attn"
        out = attention.out_proj
        if type(out) not in (NonDynamicallyQuantizableLinear, nn.Linear):
            return f"its self_attn.out_proj is a {type(out).__name__}"
        sharded = type(self).__name__.startswith("FSDP")  # then gathered before each call
        if not (sharded or plain(attention.in_proj_weight) and plain(out.weight)):
            return f"its self_attn's weight is a {type(attention.in_proj_weight).__name__}"
        for name in ("_sa_block", "_ff_block"):
            if name in self.__dict__:
                return f"its {name} was replaced"
        for child in self.children():
            for module in child.modules():
                if has_user_hooks(module):
                    return f"a hook on its {type(module).__name__} has to be called"
        if is_spread(self):
            return "its modules are spread over several devices"
        return None

    def attributes(self) -> list[tuple[dict, str]]:
        """The attributes that why_not() depends on: their dicts and names."""
        own, attention = vars(self), vars(self.self_attn)
        names = ("_qkv_same_embed_dim", "add_zero_attn", "batch_first")
        return [
            *((own, name) for name in ("_sa_block", "_ff_block")),
            *((attention, name) for name in names),
            *((self.self_attn._parameters, name) for name in ("bias_k", "bias_v")),
        ]

    def prepare(self) -> None:
        pass


class TransformerEncoder(nn.TransformerEncoder):
    _original = nn.TransformerEncoder

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        facts = None
        if not is_disabled() and is_converted(self):
            facts = self.facts()
        if facts is None or facts.untold is not None or mask is not None:
            # With a mask torch makes no nested tensors.
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        entered = None
        if not is_causal and facts.unfused is facts.rows_seen is None:
            first: Any = facts.layers[0]
            batch_first = first.self_attn.batch_first
            settings = self.__dict__[ATTRIBUTE]
            entered = enter(
                *(src, src_key_padding_mask, batch_first),
                *(settings.packed, settings.backend, not self.training),
                buckets=self._buckets(src),
            )
        if isinstance(entered, Entered):
            if not tracing.is_compiling():
                self.__dict__[KEPT] = entered.batch.kept
            batch = for_layers(entered.batch, facts, entered.x.device)
            served = None if batch.bucket is None else self._by_graph(entered, batch)
            if served is None:
                output = entered.leave(self._run(entered.x, batch))
            else:
                output = served
        else:
            output = src
            for layer in self.layers:
                output = layer(
                    output,
                    src_mask=None,
                    is_causal=bool(is_causal),
                    src_key_padding_mask=src_key_padding_mask,
                )
        return output if self.norm is None else self.norm(output)

    def _buckets(self, src: torch.Tensor) -> Buckets | None:
        """Of the graphs that may serve the call."""
        graphs = self.graphs_of_layers()
        if graphs is None or self.training or src.is_nested:
            return None
        return graphs.offered(src)

    def _run(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, bertfast_batch=batch)
        return x

    def _by_graph(self, entered: "Entered", batch: Batch) -> torch.Tensor | None:
        def finish(tokens: torch.Tensor) -> torch.Tensor:
            made = entered.leave(tokens)
            return made.clone() if made.data_ptr() == tokens.data_ptr() else made

        graphs: Graphs = self.__dict__[GRAPHS]
        return graphs.serve(entered.x, batch, self._run, finish)

    def graphs_of_layers(self) -> Graphs | None:
        return self.__dict__.get(GRAPHS)

    def call_with(self, rows: int, length: int) -> None:
        """The call of a batch of so many tokens without padding."""
        first: Any = self.facts().layers[0]
        shape = (rows, length) if first.self_attn.batch_first else (length, rows)
        self(first.linear1.weight.new_zeros(*shape, self.width()))

    def width(self) -> int:
        """Of the tokens, where graphs may launch the layers; 0 elsewhere."""
        first: Any = next(iter(self.facts().layers), None)
        return 0 if first is None else first.self_attn.embed_dim

    def why_padded(self) -> str | None:
        """Why padding is kept, whatever the call; None if it needn't."""
        facts = self.facts()
        kept = self.__dict__[ATTRIBUTE].keep_padding
        return facts.untold or kept or facts.unfused or facts.rows_seen

    def facts(self) -> Facts:
        """The facts of its modules now."""
        return facts_of(self, self._find, self._attributes)

    def _find(self) -> Facts:
        layers = [_unwrapped(layer) for layer in self.layers]
        if not layers:
            return Facts("it has no layers")
        for layer in layers:
            if not _is_converted_layer(layer):
                return Facts(f"one of its layers is a {type(layer).__name__} that is not converted")
        unfused, rows_seen = None, None
        for number, layer in enumerate(layers):
            if (reason := layer.why_not()) is not None:
                unfused = f"layer {number} runs its original code: {reason}"
                break
            if rows_seen is None:
                rows_seen = _why_rows_are_seen(number, self.layers[number], layer, layers[0])
        return Facts(None, unfused, rows_seen, **layer_facts(layers))

    def _attributes(self) -> list[tuple[dict, str]]:
        layers = map(_unwrapped, self.layers)
        return [attribute for layer in layers for attribute in layer.attributes()]

    def prepare(self) -> None:
        pass


def _is_converted_layer(layer: nn.Module) -> bool:
    return isinstance(layer, TransformerEncoderLayer) and is_converted(layer)


def _unwrapped(layer: nn.Module) -> Any:
    """The layer inside torch's checkpoint wrapper, which hands on any argument."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def _why_rows_are_seen(number: int, called: nn.Module, layer: Any, first: Any) -> str | None:
    """Why each layer takes the batch and gives it back by itself: a hook sees what passes between
    layers, or the layers take it in different forms."""
    if layer.self_attn.batch_first != first.self_attn.batch_first:
        return f"layer {number} has another batch_first than layer 0"
    reason = why_rows_are_seen(layer, (type(layer), nn.MultiheadAttention))
    if reason is not None:
        return f"in layer {number} {reason}"
    return f"a hook on layer {number} sees its rows" if sees_layout(called) else None


class Entered(NamedTuple):
    """A call's input in the form of `run_layer`'s."""

    x: torch.Tensor
    batch: Batch
    leave: Callable[[torch.Tensor], torch.Tensor]  # the output in the form of the input


def enter(
    src: torch.Tensor,
    padding: torch.Tensor | None,
    batch_first: bool,
    may_pack: bool,
    backend: str = "auto",
    sort: bool = False,
    buckets: Buckets | None = None,
) -> Entered | str:
    """Or, in words, what the call has in it that `run_layer` doesn't do."""
    if src.is_nested:
        if padding is not None or not batch_first:
            return "a nested src came with a padding mask, or where batch_first is False"
        return _enter_nested(src)
    if src.dim() not in (2, 3):
        return f"src has {src.dim()} dimensions"
    alone = src.dim() == 2
    if alone:
        x = src[None]
    else:
        x = src if batch_first else src.transpose(0, 1).contiguous()
    if padding is None:
        batch = full(x.shape[:2], x.device, buckets)
    else:
        key_mask = _attended(padding)
        if key_mask is not None and alone:
            key_mask = key_mask[None]
        if key_mask is None:
            return "src_key_padding_mask is not of bools, and not known to be of 0 and -Inf alone"
        if key_mask.shape != x.shape[:2]:
            return "src_key_padding_mask has not the shape of the tokens"  # torch's has an error
        batch = layout(key_mask, may_pack, src.device, backend, sort, buckets=buckets)

    def leave(y: torch.Tensor) -> torch.Tensor:
        if batch.packed:
            y = batch.unpack(y, zeros=True)  # as in torch's own eval
        if alone:
            return y[0]
        return y if batch_first else y.transpose(0, 1).contiguous()

    return Entered(batch.pack(x) if batch.packed else x, batch, leave)


def _enter_nested(src: torch.Tensor) -> Entered | str:
    """A nested tensor is a packed batch already; torch keeps its lengths on the host."""
    if not tracing.can_look_at(src) or src.dim() != 3:
        return "src is nested, and traced or not of rows of tokens"
    parts = src.unbind()
    lengths = [part.shape[0] for part in parts]
    cu_seqlens, plan = packing.lay_out(lengths, src.device)
    batch = Batch(cu_seqlens=cu_seqlens, max_seqlen=plan.max_seqlen, plan=plan)

    def leave(y: torch.Tensor) -> torch.Tensor:
        return torch.nested.as_nested_tensor(list(y[0].split(lengths)))

    return Entered(torch.cat(parts)[None], batch, leave)


def _attended(padding: torch.Tensor) -> torch.Tensor | None:
    """The keys that a padding mask leaves; None if it does more than that, or if that could only be
    known by waiting for the device."""
    if padding.dtype == torch.bool:
        return ~padding
    if (
        not padding.is_floating_point()
        or padding.requires_grad
        or padding.device.type != "cpu"
        or not tracing.can_look_at(padding)
    ):
        return None
    keep = padding == 0
    return keep if bool((keep | padding.isneginf()).all()) else None


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask as numbers to add: for bool masks MultiheadAttention has a fast path of its own,
    which gives NaN where a query has no keys."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


_SWAPPED = {
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
}


def swapped_class(module: nn.Module) -> type | None:
    """The class that a module's is swapped for, if it is exactly one that bertfast knows."""
    return _SWAPPED.get(type(module))
