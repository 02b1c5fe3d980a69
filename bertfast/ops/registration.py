"""Registered ops: the form in which torch's dispatcher, tracers and transforms see bertfast's ops.

Each has one Python implementation of fixed arity, the cheapest registered form. `direct` is that
implementation itself, for calls that nothing has to see as a whole (`tracing.plain_call`).
"""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("bertfast", "FRAGMENT")


class Op:
    """An op of torch.ops.bertfast, by its schema, its implementation and its fake."""

    def __init__(
        self, schema: str, implementation: Callable, fake: Callable, batched: bool = False
    ) -> None:
        """batched: vmap may run it, one element of the batch after the other."""
        name = schema.partition("(")[0]
        _library.define(schema)
        for device in ("CPU", "CUDA"):
            _library.impl(name, implementation, device)
        torch.library.register_fake(f"bertfast::{name}", fake, lib=_library)
        self.direct = implementation
        self.dispatched = getattr(torch.ops.bertfast, name).default
        if batched:
            torch.library.register_vmap(f"bertfast::{name}", self._one_by_one, lib=_library)

    def call(self, plain: bool) -> Callable:
        return self.direct if plain else self.dispatched

    def _one_by_one(self, info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        results = []
        for number in range(info.batch_size):
            results.append(
                self.dispatched(
                    *(
                        value if dim is None else value.select(dim, number)
                        for value, dim in zip(arguments, in_dims, strict=True)
                    )
                )
            )
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)


def fast_apply(function: type[torch.autograd.Function]) -> Callable:
    """A Function's apply without its Python wrapper, which only serves functorch and takes 3 us."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def empty(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A new dense tensor of the shape and place of another, whatever its strides."""
    # Spread out, as torch takes three times as long to read a torch.Size.
    return torch.empty(*(like.shape or ((),)), dtype=dtype or like.dtype, device=like.device)


def nothing(like: torch.Tensor) -> torch.Tensor:
    """An empty tensor for an output that isn't wanted: an op returns a fixed number of them."""
    return torch.empty(0, dtype=like.dtype, device=like.device)


def distinct(tensors: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
    """The tensors, each its own object: torch.compile refuses one that a Function gets twice."""
    seen: list[torch.Tensor | None] = []
    for tensor in tensors:
        if tensor is not None and any(tensor is other for other in seen):
            tensor = tensor.view_as(tensor)
        seen.append(tensor)
    return seen


def any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    """True if a graph has to be recorded for a call with these."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
