"""The derivatives that the kernels don't have: asking for one raises, whichever way it is asked.

The kernels have a first derivative, by the backward of their Functions. A second one would be
silently wrong if their results came back without a history; so where a graph of the backward is
made, `first_only` gives them one that leads to everything they were computed from, and raises.
Batched gradients are right: the backward's op runs one after the other.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.autograd.function import FunctionCtx

from ..tracing import has_tangent, in_forward_mode, is_batched

REFUSED = (
    "bertfast's kernels have a first derivative in reverse mode only, and {} was asked for. For "
    "others run the original code within bertfast.disabled(), or an op with backend='torch'"
)


if TYPE_CHECKING:

    class Context(FunctionCtx):
        """A Function's ctx, in which forward leaves attributes for backward."""

        needs_input_grad: tuple[bool, ...]
        saved_tensors: tuple[Any, ...]

        def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...
else:
    Context = FunctionCtx


def first_only(backward: Callable) -> Callable:
    """Makes a Function's backward of backward(ctx, saved, *gradients), which records no history.

    saved is a list of ctx.saved_tensors, unpacked here, as a checkpoint hands them out once; to
    empty it frees their memory. To be refused, a second derivative has to find its way: what is
    saved must include, for each input that the gradients depend on, that input or an output of the
    Function.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Context, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        if in_forward_mode() and any(map(has_tangent, (*saved, *gradients))):
            raise RuntimeError(REFUSED.format("a forward-mode derivative of the backward"))
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *gradients)
        if any(gradient is not None and is_batched(gradient) for gradient in gradients):
            raise RuntimeError(REFUSED.format("a graph of batched gradients"))
        sources = (*saved, *gradients)
        with torch.no_grad():
            results = backward(ctx, saved, *gradients)
        return _refusing(results, sources)

    return wrapper


def _refusing(
    results: tuple[torch.Tensor | None, ...], sources: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The results, with a history that leads to the sources and raises."""
    known = [tensor for tensor in sources if tensor is not None and tensor.requires_grad]
    if not known:
        return results
    present = [result for result in results if result is not None]
    connected = list(results)
    places = [place for place, result in enumerate(results) if result is not None]
    for place, result in zip(places, _Refused.apply(len(present), *present, *known), strict=True):
        connected[place] = result
    return tuple(connected)


class _Refused(torch.autograd.Function):
    """The first `count` tensors, as functions of all."""

    @staticmethod
    def forward(ctx: Context, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Context, *gradients: torch.Tensor | None) -> NoReturn:
        raise RuntimeError(REFUSED.format("a second derivative"))
