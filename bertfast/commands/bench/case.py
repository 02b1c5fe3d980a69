"""The protocol of what is timed: an op, a layer, a model. The harness knows nothing else of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .floor import Work
from .predicted import Counts

if TYPE_CHECKING:
    from .providers import Provider

Step = Callable[[], Any]  # does a case's work once


@dataclass(frozen=True)
class Setting:
    """The device that a case runs on, and the backend of torch.compile there."""

    device: str
    compile_backend: str = "inductor"


class Case(Protocol):
    """One line of headings in the tables, under which the providers stand.

    A provider makes a runner of the case and its inputs: a function for an op, a Runner for a layer
    or a model. The case checks the runner's numbers and turns it into what is timed.
    """

    @property
    def op(self) -> str:
        """The table: an op's name, "BERT-base", "BERT-base layer"."""
        ...

    @property
    def kind(self) -> str:
        """ "op", "layer" or "model"."""
        ...

    @property
    def pass_(self) -> str: ...

    @property
    def shape(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def dropout(self) -> float: ...

    @property
    def clock(self) -> str:
        """A GPU's clock: "device", of calls on several inputs in turn, replayed in a CUDA graph; or
        "call", of calls until the GPU is done."""
        ...

    def work(self) -> list[Work]:
        """The kernels that it takes at least, with their bytes and operations."""
        ...

    def counts(self, provider: "Provider") -> Counts | None:
        """The kernels, traffic and products of a provider, where they are known."""
        ...

    def providers(self) -> "Sequence[Provider]":
        """Those of the table that are compared on it."""
        ...

    def inputs(self, device: str, seed: int) -> Any:
        """The same values for the same seed."""
        ...

    def check(self, provider: "Provider", runner: Any, inputs: Any) -> float:
        """The relative error against float64. Raises Wrong where it is too large."""
        ...

    def step(self, runner: Any, inputs: Any) -> Step:
        """The call that is timed."""
        ...

    def rates(self, seconds: float) -> dict[str, float]:
        """Columns of the CSV that follow from the time of a call."""
        ...


class Wrong(Exception):
    """A provider whose numbers are off: it isn't timed."""


def held(error: float, allowed: float, what: str = "") -> float:
    """The error, if it is allowed; NaN never is."""
    if not error <= allowed:
        raise Wrong(f"{what}relative error {error:.2g} is above {allowed:.2g}")
    return error


def relative(y: torch.Tensor, right: torch.Tensor, least: float = 0.0) -> float:
    """||y - right|| / ||right||, infinite where it isn't finite. least: for a size below it."""
    if y.shape != right.shape:
        return math.inf
    size = max(right.norm().item(), least)
    difference = (y.to(right) - right).norm().item()
    error = difference / size if size else difference
    return error if math.isfinite(error) else math.inf


def normal(device: str, seed: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """A function of a shape: random values, the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)
