"""Heads of masked language models, their classes swapped: in training the loss is made of the
labelled tokens alone, and there are no logits.

    h = the encoder's output at the labelled tokens
    t = LayerNorm(act(dense(h)))                     by the head's own modules
    loss = cross_entropy(t decoder^T + bias, labels)    ops.linear_cross_entropy

Any other call runs the original code: eval, calls without labels, and heads of which a part has to
be called with all tokens. Where the host can't look at the labels, as under torch.compile, all
tokens take part in the three lines.

A sparse encoder (sparse_encoder.py) asks by `Wanted` for its vectors in place of logits:

    h = the encoder's output at the attended tokens
    vector = max over a text's tokens of log1p(relu(t decoder^T + bias))    ops.linear_log1p_max
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import gelu
from transformers.modeling_outputs import MaskedLMOutput

from .. import tracing
from ..nn.hooks import has_global_hooks, has_user_hooks, is_replaced
from ..nn.modules import Weights, has_own_forward, is_spread, plain, read_linear
from ..nn.per_token import why_rows_are_seen
from ..notice import warn_once
from ..ops import linear_cross_entropy, linear_log1p_max
from ..packing.batch import Batch, layout, packed_by_caller
from ..settings import ATTRIBUTE, KEPT, is_converted, is_disabled
from .layer import Swapped
from .model import keep_recording

IGNORED = -100  # CrossEntropyLoss's


# Names by which forwards make their losses.
_LOSSES = frozenset(("CrossEntropyLoss", "mlm_loss_fct", "loss_function"))


class Wanted:
    """Stands in the place of labels: logits shall be SPLADE's vectors, (sequences, vocabulary)."""

    refused: str | None = None  # why they are logits after all


class Head(Swapped):
    """Stands in front of the original class (BertForMaskedLM, ...). A subclass names its parts."""

    _original: Any
    _containers: tuple[tuple[str, type], ...]  # from outside in: names and classes, not called
    _own: tuple[type, ...]  # classes of the transform that act on each token alone
    _targets: tuple[str, ...] = ("labels",)  # arguments that the model under the head isn't given
    _moves_labels = False  # the original moves them to the logits' device
    _cuts_by_config = True  # the original cuts logits by config.vocab_size
    _losses = frozenset(("CrossEntropyLoss",))  # of these names the original calls

    @classmethod
    def subclass(cls, original: Any, module: str) -> type[nn.Module]:
        family = sys.modules[original.__module__]
        body = {
            "__module__": module,
            "__qualname__": original.__name__,
            "__doc__": original.__doc__,
            "_original": original,
            **cls.of_family(family, original.__name__.partition("For")[0]),
            # With the original's signature, by which trainers choose a dataset's columns.
            "forward": _forward(original),
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
    def of_family(cls, family: Any, prefix: str) -> dict[str, Any]:
        """The attributes that depend on the family's module."""
        raise NotImplementedError

    @classmethod
    def is_known(cls, original: Any) -> bool:
        """True if the original makes its loss as this does: by what its forward calls."""
        if not has_own_forward(original):
            return True  # somebody replaced it, which why_original tells
        called = _LOSSES.intersection(inspect.unwrap(original.forward).__code__.co_names)
        return bool(called) and called <= cls._losses

    def transform(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
        """All that comes before the decoder, one after another."""
        raise NotImplementedError

    def vocabulary(self) -> Any:
        """The Linear that makes the logits."""
        raise NotImplementedError

    def encode(self, input_ids: Any, arguments: dict) -> Any:
        """The outputs of the model under the head, called as the original calls it."""
        return getattr(self, self.base_model_prefix)(input_ids, **arguments)

    def outputs(self, loss: torch.Tensor, encoded: Any) -> Any:
        return MaskedLMOutput(
            loss=loss,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def why_original(self) -> str | None:
        """Why the original head runs, whatever the call; None if it needn't."""
        if not has_own_forward(self._original):
            return f"the forward of {self._original.__name__} was replaced"
        if has_global_hooks():
            return "a hook on all modules has to be called"
        module: Any = self
        for name, kind in self._containers:
            module = module._modules[name]
            if (reason := _why_called(module, kind)) is not None:
                return reason
        for part in self.transform():
            if isinstance(part, nn.Module):
                if (reason := why_rows_are_seen(part, self._own)) is not None:
                    return f"in its transform {reason}"
        decoder = self.vocabulary()
        if not isinstance(read_linear(decoder), Weights):
            if type(decoder) is not nn.Linear:
                return f"its decoder is a {type(decoder).__name__}, which has to be called"
            return "a hook on its decoder, or a weight of a kind of its own, needs its call"
        return "its modules are spread over several devices" if is_spread(self) else None

    def why_original_now(self, arguments: dict, options: dict) -> str | None:
        """Why this call runs the original head, "" if that needs no telling; None if it needn't."""
        labels = arguments["labels"]
        if not self.training or labels is None or not self.__dict__[ATTRIBUTE].loss:
            return ""
        as_dict = options.get("return_dict", arguments.get("return_dict"))
        if not (self.config.return_dict if as_dict is None else as_dict):
            return "return_dict=False asks for a tuple, in which logits have their place"
        if (reason := self.why_original()) is not None:
            return reason
        if not isinstance(labels, torch.Tensor) or labels.is_meta:
            return ""
        if labels.dtype != torch.int64:
            return f"labels are {labels.dtype}, not torch.int64"
        weight = self.vocabulary().weight
        if labels.device != weight.device and not self._moves_labels:
            return ""  # the original has an error for it, and for the next
        if _tokens(arguments) != labels.numel():
            return ""
        if self._cuts_by_config and weight.shape[0] != self.config.vocab_size:
            return f"its decoder has {weight.shape[0]} outputs, not config.vocab_size"
        return None

    def reduction(self, options: dict) -> tuple[int, Any]:
        """The label that is ignored, and by what the sum of the losses is divided; None: by their
        number. options: a call's arguments that the original's forward doesn't name."""
        return IGNORED, None

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor, options: dict) -> torch.Tensor:
        """Of the labelled tokens. hidden: of all."""
        decoder = self.weights_now()
        ignored, divisor = self.reduction(options)
        rows, labels, count = _labelled(hidden, labels, ignored)
        for part in self.transform():
            rows = part(rows)
        backend = self.__dict__[ATTRIBUTE].backend
        loss = linear_cross_entropy(
            rows,
            decoder.weight,
            labels,
            bias=decoder.bias,
            ignore_index=ignored,
            reduction="mean" if divisor is None else "sum",
            labelled=count,
            backend=backend if backend in ("auto", "torch", "triton") else "auto",
        )
        if isinstance(divisor, torch.Tensor):
            divisor = divisor.to(loss.device)
        return loss if divisor is None else loss / divisor

    def vectors(self, input_ids: Any, arguments: dict) -> MaskedLMOutput:
        """SPLADE's, as logits. On a GPU the host has looked at the mask before the encoder runs."""
        mask, bounds = arguments["attention_mask"], arguments.get("cu_seq_lens_q")
        given: torch.Tensor = input_ids if mask is None else mask
        settings, device = self.__dict__[ATTRIBUTE], self.vocabulary().weight.device
        if bounds is not None:
            tokens, longest = given.shape[1], arguments.get("max_length_q")
            batch = packed_by_caller(bounds, longest, tokens, device)
        else:
            batch = layout(mask, settings.packed, device, settings.backend)
        encoded = self.encode(input_ids, arguments)
        rows = encoded[0] if batch.padded_shape is None else batch.pack(encoded[0])
        for part in self.transform():
            rows = part(rows)
        return MaskedLMOutput(
            logits=self._vectors_of(rows, batch),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _vectors_of(self, rows: torch.Tensor, batch: Batch) -> torch.Tensor:
        """rows: (texts, length, width), or packed (1, tokens, width)."""
        decoder = self.weights_now()
        lies: dict[str, Any] = {"key_mask": batch.key_mask}
        if batch.packed:
            rows = rows[0]
            lies = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
        backend = self.__dict__[ATTRIBUTE].backend
        backend = backend if backend in ("auto", "torch", "triton") else "auto"
        made = linear_log1p_max(rows, decoder.weight, decoder.bias, **lies, backend=backend)
        # In training the original calls log1p, which autocast may give a dtype of its own; in eval
        # log1p_, which it leaves alone.
        return made.to(torch.log1p(made.new_empty(0)).dtype) if self.training else made

    def weights_now(self) -> Weights:
        """The decoder's, in the midst of a call that has found them plain."""
        decoder = read_linear(self.vocabulary())
        if not (isinstance(decoder, Weights) and plain(decoder.weight)):
            raise RuntimeError("the decoder's weight changed its kind during the call")
        return decoder

    def note(self) -> str | None:
        """For reports, after the head's name."""
        if not self.__dict__[ATTRIBUTE].loss:
            return None
        if (reason := self.why_original()) is not None:
            return f"runs its original head: {reason}"
        text = "makes its loss in training without logits"
        if is_replaced(self):  # as accelerate does for autocast
            text += ", if the forward that was put on the instance calls the class's"
        if (reason := self.__dict__.get(KEPT)) is not None:
            return f"{text}; ran its original head in training's last call: {reason}"
        return text


def _why_called(module: nn.Module, kind: type) -> str | None:
    """Why a module that should be of this class can't be passed over."""
    if type(module) is not kind:
        return f"its {kind.__name__} is a {type(module).__name__}"
    if has_user_hooks(module):
        return f"a hook on its {kind.__name__} has to be called"
    return None if has_own_forward(kind) else f"the forward of {kind.__name__} was replaced"


def _tokens(arguments: dict) -> int | None:
    for name, dims in (("input_ids", None), ("inputs_embeds", -1)):
        given = arguments.get(name)
        if isinstance(given, torch.Tensor):
            return given.shape[:dims].numel()
    return None


def _labelled(
    hidden: torch.Tensor, labels: torch.Tensor, ignored: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The rows of labelled tokens, their labels, and how many there are at most."""
    rows, labels = hidden.flatten(0, -2), labels.reshape(-1)
    device = hidden.device
    if tracing.can_look_at(labels):
        index = (labels != ignored).nonzero().squeeze(1)
        labels = labels.index_select(0, index)
        rows = rows.index_select(0, index.to(device, non_blocking=True))
    return rows, labels.to(device, non_blocking=True), labels.numel()


def _forward(original: Any) -> Callable:
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in parameters if p.name in names}

    @functools.wraps(original.forward)
    def forward(self: Head, *args: Any, **kwargs: Any) -> Any:
        if (
            not is_converted(self)
            or is_disabled()
            or len(args) > len(names)
            or any(name in kwargs for name in names[: len(args)])  # the original has an error
        ):
            return original.forward(self, *args, **kwargs)
        arguments = dict(zip(names, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in defaults}
        arguments = {**defaults, **kwargs, **arguments}
        if isinstance(wanted := arguments["labels"], Wanted):
            del arguments["labels"]
            wanted.refused = self.why_original()
            if wanted.refused is not None:
                return original.forward(self, **arguments)
            arguments["return_dict"] = True
            return self.vectors(arguments.pop("input_ids"), arguments)
        reason = self.why_original_now(arguments, options)
        if reason and not tracing.is_compiling():
            warn_once(f"runs the original head of a {original.__name__}: {reason}")
        if arguments["labels"] is not None and not tracing.is_compiling() and self.training:
            self.__dict__[KEPT] = reason or None
        if reason is not None:
            return original.forward(self, *args, **kwargs)
        arguments["return_dict"] = True
        targets = [arguments.pop(name) for name in self._targets]
        encoded = self.encode(arguments.pop("input_ids"), arguments)
        return self.outputs(self.loss(encoded[0], targets[0], options), encoded, *targets[1:])

    return forward


class ByLossFunction(Head):
    """In front of a head that hands the arguments that it doesn't name to `loss_function`, which is
    transformers' ForMaskedLMLoss unless somebody has set another."""

    _moves_labels = True
    _losses = frozenset(("loss_function",))

    def why_original_now(self, arguments: dict, options: dict) -> str | None:
        if (reason := super().why_original_now(arguments, options)) is not None:
            return reason
        if not _is_masked_lm_loss(self.loss_function):
            return "its loss_function isn't ForMaskedLMLoss as it was"
        ignored, _ = self.reduction(options)
        if type(ignored) is not int:
            return f"ignore_index is {ignored!r}, not an int"
        if getattr(self, "sparse_prediction", False):  # it cuts what has no label too
            if (cut := self.sparse_pred_ignore_index) != ignored:
                return f"sparse_prediction leaves out labels {cut}, and the loss {ignored}"
        return None

    def reduction(self, options: dict) -> tuple[int, Any]:
        return options.get("ignore_index", IGNORED), options.get("num_items_in_batch")


def _is_masked_lm_loss(function: Any) -> bool:
    """True for transformers' own, whose mean is its own too."""
    mean = getattr(function, "__globals__", {}).get("fixed_cross_entropy")
    names = [
        (getattr(f, "__module__", None), getattr(f, "__qualname__", None)) for f in (function, mean)
    ]
    return names == [(_LOSS_MODULE, "ForMaskedLMLoss"), (_LOSS_MODULE, "fixed_cross_entropy")]


_LOSS_MODULE = "transformers.loss.loss_utils"


class Bert(Head):
    @classmethod
    def of_family(cls, family: Any, prefix: str) -> dict[str, Any]:
        return {
            "_containers": (
                ("cls", getattr(family, prefix + "OnlyMLMHead")),
                ("predictions", getattr(family, prefix + "LMPredictionHead")),
            ),
            "_own": (getattr(family, prefix + "PredictionHeadTransform"),),
        }

    def transform(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
        return (self.cls.predictions.transform,)

    def vocabulary(self) -> Any:
        return self.cls.predictions.decoder


class PreTraining(Head):
    """In front of a subclass of Head: with the loss of a second task, which is made as it was."""

    _output: Any
    _scores: str  # the name by which the second task's are returned

    @classmethod
    def of_family(cls, family: Any, prefix: str) -> dict[str, Any]:
        output = getattr(family, prefix + "ForPreTrainingOutput")
        return super().of_family(family, prefix) | {"_output": output}

    def scores(self, pooled: torch.Tensor) -> torch.Tensor:
        """Of the second task, for two classes."""
        raise NotImplementedError

    def why_original_now(self, arguments: dict, options: dict) -> str | None:
        if arguments[self._targets[1]] is None:
            return ""  # the original makes no loss either
        return super().why_original_now(arguments, options)

    def outputs(self, loss: torch.Tensor, encoded: Any, *more: Any) -> Any:
        (labels,) = more
        scores = self.scores(encoded[1])
        return type(self)._output(
            loss=loss + F.cross_entropy(scores.view(-1, 2), labels.view(-1)),
            **{self._scores: scores},
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


class BertPreTraining(PreTraining, Bert):
    """With the loss of the next sentence."""

    _targets = "labels", "next_sentence_label"
    _scores = "seq_relationship_logits"

    @classmethod
    def of_family(cls, family: Any, prefix: str) -> dict[str, Any]:
        found = super().of_family(family, prefix)
        _, predictions = found["_containers"]
        both = getattr(family, prefix + "PreTrainingHeads")
        return found | {"_containers": (("cls", both), predictions)}

    def scores(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.cls.seq_relationship(pooled)


class Roberta(Head):
    """RoBERTa's, with which others share it."""

    _own = ()
    _moves_labels = True

    @classmethod
    def of_family(cls, family: Any, prefix: str) -> dict[str, Any]:
        return {"_containers": (("lm_head", getattr(family, prefix + "LMHead")),)}

    def transform(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
        head = self.lm_head
        return head.dense, gelu, head.layer_norm

    def vocabulary(self) -> Any:
        return self.lm_head.decoder


class ModernBert(ByLossFunction):
    """ModernBERT's, whose decoder stands beside it."""

    _own = ()

    @classmethod
    def of_family(cls, family: Any, prefix: str) -> dict[str, Any]:
        return {"_containers": (("head", getattr(family, prefix + "PredictionHead")),)}

    def transform(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
        return self.head.dense, self.head.act, self.head.norm

    def vocabulary(self) -> Any:
        return self.decoder
