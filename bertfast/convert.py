"""optimize, revert and report: a model's classes swapped, and the outcome told for each layer."""

import dataclasses
import functools
import html
import types
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from . import checks
from .graphs import GRAPHS, Graphs, Limits
from .nn.eligibility import WATCH
from .nn.encoder import Encoder, EncoderLayer
from .nn.hooks import has_global_hooks, is_own_forward
from .notice import warn_once
from .ops.dispatch import CHOICES
from .settings import ATTRIBUTE, KEPT, Settings, is_converted, is_swapped

M = TypeVar("M", bound=nn.Module)


def optimize(
    model: M,
    *,
    backend: str = "auto",
    packed: bool | Literal["always"] = True,
    recompute: bool = False,
    graphs: bool | Limits = False,
    masked_lm_loss: Literal["fused"] | None = None,
    strict: bool = False,
) -> M:
    """Makes the BERT-like encoders in a model run on bertfast's kernels, in place; returns it.

    The classes of the model, its encoder and its layers are swapped for subclasses of the same
    name. Parameters, state_dict keys, hooks and config stay as they are, and `revert` undoes it. A
    call that can't be fused runs the original code, and a warning says why, once. `report` lists
    what is fused. Call optimize again to change the options.

    model: any module; encoders of Hugging Face and torch.nn are found wherever they are in it.

    backend: "auto" picks for the device; "torch", "triton" or "cuda" runs that one, or raises
    ValueError in the call that it can't run.

    packed: True computes nothing for padding where that can't be seen in the results. "always" also
    takes it out in question answering, whose softmax reads it, and where masked tokens are not the
    padding token. False keeps all padding. Where padding was taken out, the encoder's output
    repeats its row's first token; in torch.nn's encoders it is zero, as in torch's own eval. On a
    GPU the host waits once a forward, for how much is padding; with "always" and an attention_mask
    on the CPU it doesn't.

    recompute: in training a layer on a GPU saves 11 numbers for each of a token's width instead of
    15, and makes the others again in the backward.

    graphs: in inference on a GPU the layers are launched as one CUDA graph, which is what small
    batches gain by. One is captured for each of some sizes of batches, when it comes the second
    time, and holds memory: True bounds the tokens of a batch, `bertfast.graphs.Limits` the memory
    too. Calls that record gradients, run under autocast or are traced do without, as do layers of
    which a module has to be called. `bertfast.graphs.warm_up` captures before the first request. A
    `bertfast.nn.Encoder` has graphs by this argument too; its other options are its own.

    masked_lm_loss: "fused" makes a masked language model's loss of the labelled tokens alone, in
    training, with labels: the head isn't computed for the others, and `logits` (of
    BertForPreTraining `prediction_logits`) are None. The loss is float32, of float64 models
    float64. Calls in eval, without labels, for a tuple, or of a head of which a part has to be
    called with all tokens run the original head. On a GPU the host waits once, for the number of
    labels; under torch.compile and in CUDA graphs all tokens take part. ValueError if the model
    has no such head. None leaves heads as they are.

    A SparseEncoder of sentence-transformers makes SPLADE's vectors without logits, in inference and
    in training, where its SpladePooling takes the largest: what a call returns has no
    `token_embeddings` then. `report` says so, or why the logits are made. The head too has no
    padding, for which the host waits for a GPU once more, before the encoder runs.

    strict: raise ValueError if the model has no encoder that bertfast knows, or one of a known
    family that it can't convert. Otherwise such a model is left as it is.

    Raises ValueError for a model that FSDP2 has sharded already: convert it first, then shard.
    """
    checks.check_module("model", model)
    checks.check_choice("backend", backend, CHOICES)
    if packed != "always" and not isinstance(packed, bool):
        raise ValueError(f'packed must be True, False or "always", got {checks.said(packed)}')
    checks.check_bool("recompute", recompute)
    if not isinstance(graphs, (bool, Limits)):
        raise ValueError(f"graphs must be True, False or Limits, got {checks.said(graphs)}")
    limits = graphs if isinstance(graphs, Limits) else Limits() if graphs else None
    if masked_lm_loss not in (None, "fused"):
        raise ValueError(
            f'masked_lm_loss must be None or "fused", got {checks.said(masked_lm_loss)}'
        )
    checks.check_bool("strict", strict)
    _refuse_sharded(model)
    if masked_lm_loss and not any(map(_head_class, model.modules())):
        raise ValueError(_why_no_head(model))
    found = False
    readers = {} if packed == "always" else _readers_of_padding(model)
    pooled = _swap_sparse_encoders(model)
    module: Any  # a swapped class has methods that nn.Module lacks
    for module in model.modules():
        keep_padding = readers.get(id(module)) if packed else "packed=False"
        settings = Settings(backend, keep_padding, packed == "always", recompute)
        if _is_sparse_encoder(module):
            module.__dict__.pop(KEPT, None)
            module.__dict__[ATTRIBUTE] = settings
            continue
        vectors = id(module) in pooled or _makes_vectors(module)
        if (head := _head_class(module, loss=False)) is not None:
            loss = masked_lm_loss is not None and _head_class(module) is not None
            module.__dict__.pop(KEPT, None)
            module.__dict__.pop(ATTRIBUTE, None)
            if loss or vectors:
                if not is_swapped(module):
                    _swap(module, head)
                module.__dict__[ATTRIBUTE] = dataclasses.replace(
                    settings, loss=loss, vectors=vectors
                )
            continue
        if isinstance(module, Encoder):
            module.__dict__.pop(GRAPHS, None)
            found = True
            continue
        if is_swapped(module):
            if not is_converted(module):  # made by `type(model)(config)`
                module.prepare()
            module.__dict__[ATTRIBUTE] = settings
            for name in (KEPT, WATCH, GRAPHS):  # they were of the settings before
                module.__dict__.pop(name, None)
            found = True
            continue
        swapped = _swapped_class(module)
        if swapped is not None:
            _swap(module, swapped)
            module.__dict__[ATTRIBUTE] = settings
            module.prepare()
            found = True
    if limits is not None:
        for module in model.modules():
            width = 0
            if isinstance(module, Encoder):
                width = module.width
            elif is_converted(module) and hasattr(module, "width"):
                width = module.width()
            if width:
                module.__dict__[GRAPHS] = Graphs(limits, width)
        if not any(GRAPHS in module.__dict__ for module in model.modules()):
            warn_once(f"launches no CUDA graphs: none can serve {type(model).__name__}")
    unknown = [reason for module in model.modules() if (reason := _why_model_unknown(module))]
    if strict and (unknown or not found):
        raise ValueError(f"bertfast knows no module of {type(model).__name__}: {report(model)}")
    for reason in unknown:
        where = "" if isinstance(_hf(), str) else " wherever there is a mask"
        warn_once(f"runs the original code{where}: {reason}")
    return model


def revert(model: M) -> M:
    """Undoes `optimize`, in place; returns the model.

    The classes are those from before, and so are the results, to the bit. Weights that were
    trained or loaded in between stay. A module that was never converted is left as it is.

    model: what `optimize` was given, or a module that has it inside.

    Raises ValueError for a model that FSDP2 has sharded since.
    """
    checks.check_module("model", model)
    converted: list[Any] = [module for module in model.modules() if is_swapped(module)]
    for module in converted:
        if "_original" not in type(module).__dict__:
            raise ValueError(
                f"model must be reverted before it is sharded: {type(module)._original.__name__} "
                f"is a {type(module).__name__}"
            )
    for module in model.modules():
        module.__dict__.pop(GRAPHS, None)
    for module in converted:
        _swap(module, type(module)._original)
        for name in [name for name in module.__dict__ if name.startswith(ATTRIBUTE)]:
            del module.__dict__[name]
    return model


def _swap(module: nn.Module, kind: type[nn.Module]) -> None:
    """Changes the class, and with it the class's forward where libraries keep it on the instance:
    accelerate's hooks call it under another name, and transformers 5.0 leaves it there."""
    before = type(module)
    kept = [
        name
        for name in ("forward", "_old_forward")
        if is_own_forward(module, module.__dict__.get(name), before)
    ]
    module.__class__ = kind
    for name in kept:
        module.__dict__[name] = types.MethodType(kind.forward, module)


def _readers_of_padding(model: nn.Module) -> dict[int, str]:
    """Modules under a head that looks at padded positions, by id, and why they keep them."""
    found: dict[int, str] = {}
    for head in model.modules():
        # By the name of what makes spans' scores, which heads of all names share, or the head's.
        name = type(head).__name__
        if "qa_outputs" in head._modules or name.endswith("ForQuestionAnswering"):
            reason = "question answering's softmax reads it"
        elif any(getattr(child, "summary_type", "first") != "first" for child in head.children()):
            reason = "the summary of a sequence reads it"
        elif _expands_by_padding(head):
            reason = "query expansion by the padding token reads it"
        else:
            continue
        found.update((id(module), reason) for module in head.modules())
    return found


def _expands_by_padding(module: nn.Module) -> bool:
    """True where sentence-transformers expands queries by unattended tokens that look like padding;
    expansion by another token is seen in the batch."""
    expansion = getattr(module, "query_expansion", None)
    if not isinstance(expansion, dict) or expansion.get("attend"):
        return False
    pad = getattr(getattr(module, "tokenizer", None), "pad_token", None)
    return pad is not None and expansion.get("token") == pad


@functools.cache
def _hf() -> types.ModuleType | str:
    """bertfast.hf, or why it doesn't work with the transformers that is here."""
    try:
        from . import hf
    except ImportError as error:
        return str(error)
    return hf


def _swapped_class(module: nn.Module) -> type[nn.Module] | None:
    if type(module).__module__ == "torch.nn.modules.transformer":
        from . import torch_nn

        return torch_nn.swapped_class(module)
    if _is_of_transformers(type(module)):
        hf = _hf()
        return None if isinstance(hf, str) else hf.swapped_class(module)
    return None


def _head_class(module: nn.Module, loss: bool = True) -> type[nn.Module] | None:
    """The class of a masked language model's head that makes its loss or vectors without logits."""
    if not (is_swapped(module) or _is_of_transformers(type(module))):
        return None
    hf = _hf()
    return None if isinstance(hf, str) else hf.head_class(module, loss)


def _makes_vectors(module: nn.Module) -> bool:
    """True for a head that was converted inside a sparse encoder, though that isn't given now."""
    return is_converted(module) and module.__dict__[ATTRIBUTE].vectors


def _is_sparse_encoder(module: nn.Module) -> bool:
    return is_swapped(module) and type(module).__name__ == "SparseEncoder"


def _swap_sparse_encoders(model: nn.Module) -> set[int]:
    """Those of sentence-transformers; returns the heads whose logits they pool, by id."""
    found: set[int] = set()
    for module in model.modules():
        if type(module).__name__ != "SparseEncoder" or isinstance(hf := _hf(), str):
            continue
        kind = hf.sparse_encoder_class(module)
        if kind is not None:
            if not is_swapped(module):
                _swap(module, kind)
            encoder: Any = module
            found.update(map(id, encoder.heads()))
    return found


def _why_no_head(model: nn.Module) -> str:
    hf = _hf()
    known = hf if isinstance(hf, str) else f"bertfast knows {hf.heads_known()}"
    return f'masked_lm_loss="fused" needs a head, and {type(model).__name__} has none: {known}'


def _is_of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


def _why_model_unknown(module: nn.Module) -> str | None:
    """As in hf.py; for any model of a transformers that is too old, that."""
    if not any(map(_is_of_transformers, type(module).__mro__)):
        return None
    hf = _hf()
    if isinstance(hf, str):
        return hf if hasattr(module, "config") else None
    return hf.why_model_unknown(module)


def _refuse_sharded(model: nn.Module) -> None:
    """FSDP2 has made a class of its own of each layer's; a swap would change nothing."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__.startswith("FSDP") and len(kind.__mro__) > 2:
            base = kind.__mro__[2]
            if base.__module__.startswith(("transformers.", "torch.nn.modules.transformer")):
                raise ValueError(
                    f"model must be converted before it is sharded: {base.__name__} is a "
                    f"{kind.__name__} already. Call bertfast.optimize before fully_shard."
                )


@dataclass(frozen=True)
class Row:
    """An encoder layer: its name in the model, its class, and why it isn't fused, or None."""

    name: str
    kind: str
    reason: str | None

    @property
    def status(self) -> str:
        return "fused" if self.reason is None else self.reason


class Report(list):
    """Rows that print as a table, in a notebook too, and under them where padding is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def __str__(self) -> str:
        if not self:
            return "no encoder layer that bertfast knows"
        table = [("layer", "class", "status")] + [(r.name, r.kind, r.status) for r in self]
        widths = [max(len(line[column]) for line in table) for column in range(2)]
        lines = [
            f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {status}" for name, kind, status in table
        ]
        return "\n".join(lines + self.notes)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self:
            return f"<p>{html.escape(str(self))}</p>"
        head = "<tr><th>layer</th><th>class</th><th>status</th></tr>"
        rows = "".join(
            f"<tr><td>{html.escape(r.name)}</td><td>{html.escape(r.kind)}</td>"
            f"<td>{html.escape(r.status)}</td></tr>"
            for r in self
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table>{head}{rows}</table>{notes}"


def report(model: nn.Module) -> Report:
    """Lists the outcome for each encoder layer: fused, or the reason why not.

    The result is a list of `Row`s (name, kind, reason; `status` is "fused" or the reason) that
    prints as a table, in a notebook too. Its `notes`, printed below, say which model keeps its
    padding, and why: always, or in its last call.

    model: any module, converted or not. Nothing is computed and nothing in it changes.
    """
    checks.check_module("model", model)
    rows = Report()
    unknown: dict[int, str | None] = {}  # why a module's model doesn't tell it of masks
    never: dict[int, str | None] = {}  # why it fuses no call
    for name, module in model.named_modules():
        kind = type(module).__name__
        reason = _why_model_unknown(module)
        if reason is not None or (is_converted(module) and hasattr(module, "why_padded")):
            unknown.update((id(part), reason) for part in module.modules())
        if is_converted(module):
            if hasattr(module, "why_never") and (reason := module.why_never()) is not None:
                never.update((id(part), reason) for part in module.modules())
            if hasattr(module, "why_not"):
                reason = module.why_not() or never.get(id(module))
                if reason is None and unknown.get(id(module)) is not None:
                    reason = f"fused only where there is no mask: {unknown[id(module)]}"
                rows.append(Row(name, kind, reason))
            if hasattr(module, "note") and (note := module.note()) is not None:
                rows.notes.append(f"{name or kind} {note}")
            if hasattr(module, "why_padded"):
                if (reason := module.why_padded()) is not None:
                    rows.notes.append(f"{name or kind} keeps padding: {reason}")
                elif (reason := module.__dict__.get(KEPT)) is not None:
                    rows.notes.append(f"{name or kind} kept padding in its last call: {reason}")
                if (graphs := module.graphs_of_layers()) is not None:
                    rows.notes.append(f"{name or kind} {graphs.told()}")
            continue
        if isinstance(module, EncoderLayer):
            rows.append(Row(name, kind, None))
            continue
        if isinstance(module, Encoder) and (graphs := module.graphs_of_layers()) is not None:
            rows.notes.append(f"{name or kind} {graphs.told()}")
        swapped = type(module) if is_swapped(module) else _swapped_class(module)
        if swapped is not None and hasattr(swapped, "why_not"):
            rows.append(Row(name, kind, "not converted"))
        elif swapped is None and _looks_like_a_layer(module):
            rows.append(Row(name, kind, _why_unknown(module)))
    if has_global_hooks():
        rows.notes.append("all run their original code: a hook on all modules has to be called")
    return rows


def _why_unknown(module: nn.Module) -> str:
    if _is_of_transformers(type(module)):
        hf = _hf()
        reason = hf if isinstance(hf, str) else hf.why_unknown(type(module))
        if reason is not None:
            return reason
    return "bertfast doesn't know this class"


def _looks_like_a_layer(module: nn.Module) -> bool:
    kind = type(module).__name__
    return kind.endswith(("EncoderLayer", "Layer", "Block")) and any(
        "attention" in name.lower() or "attn" in name.lower() for name, _ in module.named_children()
    )
