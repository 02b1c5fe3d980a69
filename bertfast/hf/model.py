"""A Hugging Face model and its encoder, their classes swapped: how the batch lies is decided once,
at the model, and every layer is told.

    packed     the padding is taken out before the embeddings, or where those can't take packed ids
               after them, and comes back after the last layer
    padded     fused, with a mask of the keys
    original   the code that was there before, for what bertfast doesn't do
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .. import tracing
from ..graphs import GRAPHS, Finish, Graphs
from ..nn.eligibility import Facts, facts_of, layer_facts
from ..nn.hooks import has_global_hooks, is_replaced, sees_layout
from ..nn.layer import for_layers
from ..nn.per_token import why_rows_are_seen
from ..notice import warn_once
from ..packing.batch import Batch, Buckets, full, layout, packed_by_caller
from ..packing.looking import Padding
from ..settings import ATTRIBUTE, KEPT, is_converted, is_disabled
from .layer import ARGUMENT, Layer, Swapped, changes_layers

# Arguments that the model itself deals with; the layers have to know any other.
_HANDLED = frozenset(
    ("inputs_embeds", "attention_mask", "output_attentions")
    + ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
)
# Wrappers around a layer that hand on any argument, and where they keep it.
_WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


class Model(Swapped):
    """Stands in front of the original model class (BertModel, ...)."""

    TAKES = ("input_ids", "attention_mask")  # arguments that the original's forward must know
    PASSES_ON = True  # and any other
    # Those with a number for each token, which its embeddings take.
    TOKENS: tuple[str, ...] = ("input_ids", "token_type_ids", "position_ids")
    _original: Any
    _own_kinds: tuple[type, ...]

    @classmethod
    def subclass(cls, original: Any, module: str) -> type[nn.Module]:
        body = {
            "__module__": module,
            "__qualname__": original.__name__,
            "__doc__": original.__doc__,
            "_original": original,
            "_own_kinds": cls.own_kinds(original),
            # With the original's signature, by which trainers choose a dataset's columns.
            "forward": _model_forward(original),
            # transformers finds these out by reading the source around the class.
            "_can_set_attn_implementation": original._can_set_attn_implementation,
            "_can_set_experts_implementation": original._can_set_experts_implementation,
        }
        if hasattr(original, "is_custom_code"):
            # By it they know whose checkpoints they rename when they save and load.
            body["is_custom_code"] = original.is_custom_code
        made = type(original.__name__, (cls, original), body)
        keep_recording(original, made)
        return made

    @classmethod
    def own_kinds(cls, original: type) -> tuple[type, ...]:
        """The classes of what comes before its layers, as they were written: the embeddings'."""
        name = original.__name__.removesuffix("Model") + "Embeddings"
        return (getattr(sys.modules[original.__module__], name),)

    def encoder_module(self) -> nn.Module:
        raise NotImplementedError

    def position_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def encoder_layers(self) -> list[Any]:
        encoder: Any = self.encoder_module()
        return [unwrapped(layer) for layer in encoder.layer.children()]

    def prepare(self) -> None:
        pass

    def why_padded(self) -> str | None:
        """Why padding is kept, whatever the call; None if it needn't."""
        return self._why_padded(self.facts())

    def _why_padded(self, facts: Facts) -> str | None:
        settings = self.__dict__[ATTRIBUTE]
        if settings.keep_padding is not None:
            return settings.keep_padding
        if facts.untold is not None:
            return facts.untold
        reason = facts.unfused or facts.rows_seen
        if reason is not None:
            return reason
        if self.config.pad_token_id is None and not settings.always:
            return "without config.pad_token_id it can't be told from tokens that are read"
        return None

    def _decide(self, arguments: dict, facts: Facts) -> Batch | None:
        """How the batch lies; None for the original code."""
        reason = self._why_original(arguments, facts)
        if reason is not None:
            if reason:
                warn_once(f"runs the original code: {reason}")
            return None
        x = _tokens_of(arguments)
        cu_seqlens = arguments.get("cu_seq_lens_q")
        if cu_seqlens is not None:
            longest = arguments.get("max_length_q")
            return packed_by_caller(cu_seqlens, longest, x.shape[1], x.device)
        mask = arguments.get("attention_mask")
        buckets = self._buckets(arguments, x)
        if mask is None:
            return full(x.shape[:2], x.device, buckets)
        if mask.device.type == "cpu" and tracing.can_look_at(mask) and mask.bool().all():
            return full(x.shape[:2], x.device, buckets)
        settings = self.__dict__[ATTRIBUTE]
        kept = self._why_kept(arguments, facts)
        ids, padding = arguments.get("input_ids"), None
        if kept is None and ids is not None and not settings.always:
            padding = Padding(ids, self.config.pad_token_id)
        batch = layout(
            *(mask, kept is None, x.device, settings.backend, not self.training, padding, buckets),
            unbroken=self.knows_distances(),
        )
        if not tracing.is_compiling():
            self.__dict__[KEPT] = kept or batch.kept
        return batch

    def knows_distances(self) -> bool:
        """True if distances between a row's tokens count in its layers."""
        return False

    def _buckets(self, arguments: dict, x: torch.Tensor) -> Buckets | None:
        """Of the graphs that may serve the call."""
        graphs = self.graphs_of_layers()
        if graphs is None or self.training or self._shows_layers(arguments):
            return None
        return graphs.offered(x)

    def graphs_of_layers(self) -> Graphs | None:
        return self.encoder_module().__dict__.get(GRAPHS)

    def call_with(self, rows: int, length: int) -> None:
        """The call of a batch of so many tokens without padding."""
        token = 1 if self.config.pad_token_id == 0 else 0
        embedding: Any = self.get_input_embeddings()
        self(input_ids=torch.full((rows, length), token, device=embedding.weight.device))

    def before_packing(self, arguments: dict) -> None:
        """Whatever has to be done with the arguments as they were given, the mask among them."""

    def call(self, arguments: dict) -> Any:
        """The original forward, told how the batch lies by ARGUMENT."""
        return self._original.forward(self, **arguments)

    def asked(self, arguments: dict, name: str) -> bool:
        """True if the call, or the configuration, asks for an output (output_attentions, ...)."""
        given = arguments.get(name)
        return getattr(self.config, name, False) if given is None else given

    def _shows_layers(self, arguments: dict) -> bool:
        """True if each layer's output is asked for."""
        return self.asked(arguments, "output_hidden_states")

    def why_never(self) -> str | None:
        """Why the configuration lets no call be fused; None if it does."""
        config = self.config
        if getattr(config, "is_decoder", False) or getattr(config, "is_causal", False):
            return "the model is a decoder"
        return None

    def _why_original(self, arguments: dict, facts: Facts) -> str | None:
        """The reason for the original code, "" if it needs no telling; None if there is none."""
        if has_global_hooks():
            return "a hook on all modules has to be called"
        if (reason := self.why_never()) is not None:
            return reason
        if facts.untold is not None:
            return facts.untold
        if self.asked(arguments, "output_attentions"):
            return "attention weights were asked for"
        others = {k: v for k, v in arguments.items() if k not in _HANDLED and k not in self.TOKENS}
        name = changes_layers(others, self.config)
        if name is not None:
            return f"{name} was given"
        x = _tokens_of(arguments)
        if x is None:
            return ""  # the original has an error for it
        mask = arguments.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
                form = f"{mask.ndim}-D" if isinstance(mask, torch.Tensor) else type(mask).__name__
                return f"attention_mask is {form}, not a mask of the tokens"
            if mask.shape != x.shape[:2]:
                return "attention_mask has not the shape of the tokens"
        if arguments.get("cu_seq_lens_q") is not None:
            if mask is not None:
                return "both attention_mask and cu_seq_lens_q were given"
            if x.shape[0] != 1:
                return "cu_seq_lens_q was given for more than one row"
            if facts.unfused is not None:
                return f"cu_seq_lens_q was given, and {facts.unfused}"
        return None

    def facts(self) -> Facts:
        """The facts of its modules now."""
        return facts_of(self, self._find, self._attributes)

    def _find(self) -> Facts:
        untold = self.why_untold()
        if untold is not None:
            return Facts(untold)
        layers, unfused, rows_seen = self.encoder_layers(), None, None
        for number, layer in enumerate(layers):
            if (reason := layer.why_not()) is not None:
                unfused = f"layer {number} runs its original code: {reason}"
                break
            if rows_seen is None and (reason := layer.why_rows_are_seen()) is not None:
                rows_seen = f"in layer {number} {reason}"
        around, beside = self.surroundings(layers)
        for module in beside:
            rows_seen = rows_seen or why_rows_are_seen(module)
        for module in around:
            if rows_seen is None and sees_layout(module):
                rows_seen = f"a hook on a {type(module).__name__} sees its rows"
        return Facts(
            *(None, unfused, rows_seen),
            embeddings_plain=self._embeddings_are_plain(),
            beside=tuple(beside),
            **layer_facts(layers),
        )

    def surroundings(self, layers: list[Any]) -> tuple[list[nn.Module], ...]:
        """Of the layers: the modules that they are in, and those that are called beside them."""
        return _other_modules(self.encoder_module(), layers)

    def _attributes(self) -> list[tuple[dict, str]]:
        return [attribute for layer in self.encoder_layers() for attribute in layer.attributes()]

    def why_untold(self) -> str | None:
        """Why some layer can't be told how the batch lies, or the encoder can't unpack it."""
        encoder = self.encoder_module()
        if not (isinstance(encoder, Encoder) and is_converted(encoder)):
            return f"its encoder is a {type(encoder).__name__}"
        return why_untold("encoder", [encoder]) or why_untold("layer", self.encoder_layers())

    def _why_kept(self, arguments: dict, facts: Facts) -> str | None:
        """Why the call's results would show that tokens moved; None if they never do."""
        if self._shows_layers(arguments):
            return "hidden states were asked for"
        return self._why_padded(facts)

    def _pack(self, arguments: dict, batch: Batch, facts: Facts) -> None:
        """Replaces the padded arguments by packed ones, if the embeddings see one token at a time.
        Otherwise the encoder packs what comes out of them."""
        names = [n for n in self.TOKENS if n in arguments]
        given = {name: arguments[name] for name in names if arguments[name] is not None}
        if "input_ids" not in given or not facts.embeddings_plain:
            return
        if "position_ids" in self.TOKENS and "position_ids" not in given:
            given["position_ids"] = self.position_ids(given["input_ids"])
        if batch.padded_shape is None:
            return
        rows, length = batch.padded_shape
        if any(
            t.ndim != 2 or t.shape[0] not in (1, rows) or t.shape[1] != length
            for t in given.values()
        ):
            return  # the original broadcasts it, or has an error for it
        for name, tensor in given.items():
            arguments[name] = batch.pack(tensor)

    def _embeddings_are_plain(self) -> bool:
        """True if all that comes before the encoder acts on each token alone. Of the encoder itself
        only hooks count: they see its input."""
        encoder = self.encoder_module()
        own = self._own_kinds
        return not sees_layout(encoder) and not any(
            why_rows_are_seen(child, own)
            for child in self.children()
            if child is not encoder and child is not getattr(self, "pooler", None)
        )


def why_untold(kind: str, modules: list[Any]) -> str | None:
    """Why one of a model's modules can't be told how the batch lies."""
    for module in modules:
        if not (isinstance(module, (Encoder, Layer)) and is_converted(module)):
            return f"one of its layers is a {type(module).__name__} that wasn't converted"
        if is_replaced(module):
            return f"the forward of its {kind} was replaced on the instance"
    return None


def unwrapped(layer: nn.Module) -> Any:
    if isinstance(layer, Layer):
        return layer
    for name in _WRAPPED:
        layer = getattr(layer, name, layer)
    return layer


def _other_modules(encoder: nn.Module, layers: list[Any]) -> tuple[list[nn.Module], ...]:
    """The modules of an encoder with layers inside, and the outermost of those without, which are
    called beside layers."""
    own = set(map(id, layers))
    around, beside, left = [], [], list(encoder.children())
    while left:
        module = left.pop()
        if id(module) in own:
            continue
        if own.isdisjoint(map(id, module.modules())):
            beside.append(module)
        else:
            around.append(module)
            left += module.children()
    return around, beside


def _tokens_of(arguments: dict) -> Any:
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def _model_forward(original: Any) -> Callable:
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(original.forward)
    def forward(self: Model, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
            return original.forward(self, *args, **kwargs)  # which has an error for it
        arguments = dict(zip(names, args, strict=False), **kwargs)
        batch = None
        if not is_disabled() and is_converted(self):
            facts = self.facts()
            batch = self._decide(arguments, facts)
        if batch is not None:
            batch = for_layers(batch, facts, _tokens_of(arguments).device)
            self.before_packing(arguments)
        arguments[ARGUMENT] = batch
        if batch is not None:
            arguments["attention_mask"] = None  # the layers have it in the batch
            if batch.padded_shape is not None:
                self._pack(arguments, batch, facts)
        elif self.why_untold() is not None:
            del arguments[ARGUMENT]  # another library's encoder doesn't take it
        return self.call(arguments)

    return forward


class Encoder(Swapped):
    """Stands in front of the original encoder class: takes the padding out before the first layer,
    if the model hasn't, and puts it back after the last."""

    TAKES: tuple[str, ...] = ("hidden_states", "attention_mask")
    PASSES_ON = True
    _original: Any

    @classmethod
    def subclass(cls, original: Any, module: str) -> type[nn.Module]:
        body = {
            "__module__": module,
            "__qualname__": original.__name__,
            "__doc__": original.__doc__,
            "_original": original,
            "forward": _encoder_forward(original),
        }
        return type(original.__name__, (cls, original), body)

    def prepare(self) -> None:
        pass

    def call(self, x: torch.Tensor, args: tuple, kwargs: dict) -> Any:
        """The original forward, told how the batch lies by ARGUMENT."""
        return self._original.forward(self, x, *args, **kwargs)

    def called(self) -> list[nn.Module]:
        """Its layers, in whatever they are wrapped."""
        return list(self.layer.children())

    def width(self) -> int:
        """Of the tokens, for graphs."""
        return width_of(map(unwrapped, self.called()))


def _encoder_forward(original: Any) -> Callable:
    @functools.wraps(original.forward)
    def forward(self: Encoder, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = kwargs.get(ARGUMENT)
        if batch is not None and batch.padded_shape is not None:
            if hidden_states.shape[:2] == batch.padded_shape:
                hidden_states = batch.pack(hidden_states)
        if batch is not None and batch.bucket is not None:
            outputs = _by_graph(self, hidden_states, batch, args, kwargs)
            if outputs is not None:
                return outputs
        if batch is None or batch.padded_shape is None:
            return self.call(hidden_states, args, kwargs)
        outputs = self.call(hidden_states, args, kwargs)
        last = outputs.last_hidden_state
        outputs.last_hidden_state = batch.on(last.device).unpack(last)
        return outputs

    return forward


def _by_graph(
    encoder: Encoder, x: torch.Tensor, batch: Batch, args: tuple, kwargs: dict
) -> Any | None:
    graphs: Graphs = encoder.__dict__[GRAPHS]

    def run(tokens: torch.Tensor, any_batch: Batch) -> torch.Tensor:
        outputs = encoder.call(tokens, args, {**kwargs, ARGUMENT: any_batch})
        if len(outputs) != 1:
            raise RuntimeError("the encoder returns more than its last hidden state")
        graphs.outputs = type(outputs)
        return outputs.last_hidden_state

    y = graphs.serve(x, batch, run, finish(batch))
    return None if y is None else graphs.outputs(last_hidden_state=y)


def finish(batch: Batch) -> Finish:
    """Takes the tokens out of a graph's memory, which the next call uses again."""
    return torch.clone if batch.padded_shape is None else batch.unpack


def width_of(layers: Iterable[Any]) -> int:
    """Of the tokens in these layers; 0 if there is none."""
    first = next(iter(layers), None)
    return 0 if first is None else first.parts().down_norm.weight.shape[0]


def keep_recording(original: Any, made: type) -> None:
    """transformers looks up what a model class can record (hidden states, attentions) by the
    class's text."""
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY as registry
    except ImportError:  # before 5.2
        from transformers.utils.generic import (  # type: ignore[attr-defined, no-redef]
            _CAN_RECORD_REGISTRY as registry,
        )
    # By dict's own method: in newer versions the registry's takes a model.
    dict.__setitem__(registry, str(made), original._can_record_outputs)
