"""linear_cross_entropy: the loss of a masked language model's head. Check, gather, run.

Only rows with a label are projected to the vocabulary, some hundred at a time (chunks.py): logits
of the whole batch never exist. Products are torch's; a backend does what stands between them.
"""

import operator

import torch

from ... import checks, tracing
from .. import dispatch
from ..registration import any_requires_grad
from . import reference
from .chunks import NOTHING, losses_and_gradients
from .registered import LinearCrossEntropy

__all__ = ["linear_cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    labelled: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """cross_entropy(hidden weight^T + bias, labels), as torch's for logits in float32.

    hidden is (..., width), labels int64 (...), weight (vocabulary, width), bias (vocabulary,).
    Rows whose label is ignore_index count for nothing and are never projected. The result is
    float32, of float64 tensors float64: a number, or with reduction="none" of labels' shape.

    reduction, ignore_index and label_smoothing are those of torch's cross_entropy: where no row is
    labelled, the mean is NaN and all gradients are zero.

    labelled: how many rows have a label, or more; the host then doesn't wait for a GPU to count
    them. More labels than that are an error: on a GPU an assertion there, as for labels that are
    out of range.

    backend: "auto", "torch" or "triton", which has kernels for what stands between the products; an
    explicit one that can't run here raises ValueError. The products are torch's, on every device.
    While something is traced or transformed, all logits are made at once, by torch.
    """
    _check(hidden, weight, labels, bias)
    checks.check_int("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_number("label_smoothing", label_smoothing, 0, 1)
    if labelled is not None:
        checks.check_int("labelled", labelled, 0, 2**63 - 1)
    cast = tracing.autocast(hidden)
    if cast is not None:
        hidden, weight = hidden.to(cast), weight.to(cast)
        bias = None if bias is None else bias.to(cast)
    vocabulary = operator.index(weight.shape[0])
    backend = dispatch.choose(
        "linear_cross_entropy", backend, hidden.device, hidden.dtype, vocabulary
    )
    plain = tracing.plain_call(hidden, weight, labels, bias) and not tracing.only_reference()
    if plain or tracing.can_look_at(labels):
        flat = labels.flatten()
        counted = flat != ignore_index
        _check_range(flat, counted, vocabulary)
    if not plain:
        options = (ignore_index, reduction, label_smoothing)
        return reference.forward(hidden, weight, labels, bias, *options)

    index, count = _places(counted, labelled)
    rows, chosen = hidden.flatten(0, -2), flat
    if index is not None:
        rows, chosen = rows.index_select(0, index), flat.index_select(0, index)
    if labelled is not None:
        kept = chosen != ignore_index
        chosen = chosen.where(kept, -1)
        # A NaN of a row without a label would reach the products' sums: 0 * NaN.
        rows = torch.where(kept[:, None], rows, 0)
    arguments = (rows, weight, bias, chosen, float(label_smoothing))
    apart = reduction == "none"
    if any_requires_grad(rows, weight, bias):
        loss = LinearCrossEntropy.apply(*arguments, apart, backend)
    else:
        loss, _ = losses_and_gradients(*arguments, None, NOTHING, backend)
        loss = loss if apart else loss.sum()
    if apart:
        if index is not None:
            loss = loss.new_zeros(flat.shape).index_copy(0, index, loss)
        return loss.view(labels.shape)
    if reduction == "sum":
        return loss
    # 0 / 0: without labels there is nothing to take the mean of, and nothing to learn.
    return torch.where(count > 0, loss / count.clamp(min=1), torch.nan)


def _places(
    counted: torch.Tensor, labelled: int | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The rows that have a label, and how many there are. With `labelled` so many rows, those that
    have one first. None: all rows."""
    count = counted.sum()
    if labelled is None:
        return counted.nonzero().squeeze(1), count
    if labelled >= counted.numel():
        return None, count
    if tracing.on_host(counted):
        if count > labelled:
            raise ValueError(f"labelled must be {int(count)} or more, the labels, got {labelled}")
    else:
        torch._assert_async(count <= labelled, "there are more labels than `labelled` says")
    order = torch.argsort(counted.to(torch.int8), descending=True, stable=True)
    return order[:labelled], count


def _check_range(labels: torch.Tensor, counted: torch.Tensor, vocabulary: int) -> None:
    wrong = counted & ((labels < 0) | (labels >= vocabulary))
    if tracing.on_host(labels):
        if bool(wrong.any()):
            value = int(labels[wrong][0])
            raise ValueError(
                f"labels must be ignore_index or between 0 and {vocabulary - 1}, got {value}"
            )
    else:
        text = f"labels must be ignore_index or between 0 and {vocabulary - 1}"
        torch._assert_async(~wrong.any(), text)


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> None:
    checks.check_float("hidden", hidden)
    cast = tracing.autocast(hidden) is not None
    checks.check_product(hidden, weight, bias, cast, ("hidden", "vocabulary", "width"))
    checks.check_tensor("labels", labels, "an int64 tensor")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, got {labels.dtype}")
    if labels.shape != hidden.shape[:-1] or labels.device != hidden.device:
        raise ValueError(
            f"labels must have shape {checks.sizes(hidden.shape[:-1])} on {hidden.device}, "
            f"got {checks.shape(labels)} on {labels.device}"
        )
