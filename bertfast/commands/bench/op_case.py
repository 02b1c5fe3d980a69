"""The common part of all ops' cases: steps, check, names of the functions.

A subclass is a frozen dataclass of a pass, sizes, a dtype and a dropout, in a module of its own in
`cases`. Its `functions` say how each provider computes the op: by the provider's name, but for

    bertfast        a function of the backend, which gives the function
    torch eager     stock torch, which is compiled, too; or as `stock` says
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ...ops import dispatch
from ...testing import nearest_to_budget
from .case import Step, Wrong, held, relative
from .floor import Work
from .predicted import Counts
from .providers import Provider, of_kind

# ||difference|| / ||reference|| that any honest implementation stays under: stock torch rounds to
# the dtype a few times on the way, each time by at most u. Ours also have the error budget.
LIMITS = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@dataclass(frozen=True)
class Inputs:
    leaves: dict[str, torch.Tensor]  # those that get gradients, by the functions' names for them
    dy: torch.Tensor
    more: dict[str, Any] = field(default_factory=dict)  # what else the functions are given
    # The same for functions marked `packed`: tokens without padding, a bias as a table.
    packed: "Inputs | None" = None

    def of(self, function: Callable) -> "Inputs":
        return self.packed if self.packed and getattr(function, "packed", False) else self

    def double(self) -> "Inputs":
        leaves = {name: leaf.double() for name, leaf in self.leaves.items()}
        return Inputs(leaves, self.dy.double(), self.more)


class OpCase:
    kind: ClassVar[str] = "op"
    clock: ClassVar[str] = "device"
    op: ClassVar[str]
    functions: ClassVar[Mapping[str, Callable]]
    stock: ClassVar[str] = "torch eager"
    exact: ClassVar[str] = ""  # the function that is right in float64, if it isn't the stock one
    pass_: str  # forward, training (a forward that saves what the backward needs), or backward
    dtype: torch.dtype
    dropout: float

    @property
    def shape(self) -> str:
        raise NotImplementedError

    def work(self) -> list[Work]:
        raise NotImplementedError

    def moves(self) -> Mapping[str, tuple[int, float]]:
        """By the names of providers, where they are known: kernels, and bytes that they read or
        write. "bertfast" stands for both of its backends' kernels."""
        return {}

    def counts(self, provider: Provider) -> Counts | None:
        known = self.moves()
        kernels = provider.ours and provider.backend in dispatch.BACKENDS[1:]
        found = known.get("bertfast" if kernels else provider.name)
        return None if found is None else Counts(*found)

    def inputs(self, device: str, seed: int) -> Inputs:
        raise NotImplementedError

    @property
    def form(self) -> tuple:
        """The dtype, and sizes that some backend refuses: what `unsupported_reason` is asked."""
        return (self.dtype,)

    def for_budget(self) -> Any:
        """A case of bertfast.testing: a few rows of this one, for the error budget."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the functions, besides the inputs."""
        return {}

    def budget_of(self, provider: Provider, device: str) -> tuple[str, Any]:
        """The backend and the case that bertfast.testing is to run for one of ours."""
        return provider.backend, self.for_budget()

    def providers(self) -> Sequence[Provider]:
        return [provider for provider in of_kind("op") if provider.calls in self.functions]

    def rates(self, seconds: float) -> dict[str, float]:
        return {"gb_per_s": sum(work.bytes for work in self.work()) / seconds / 1e9}

    def step(self, runner: Callable, inputs: Inputs) -> Step:
        """A pass as a function without arguments, which returns a tuple of outputs."""
        inputs = inputs.of(runner)
        call = functools.partial(runner, **inputs.more, **self.options())
        if self.pass_ == "forward":

            def forward() -> tuple[torch.Tensor, ...]:
                with torch.no_grad():
                    return _outputs(call(**inputs.leaves))

            return forward
        leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.leaves.items()}

        def training() -> tuple[torch.Tensor, ...]:
            return _outputs(call(**leaves))

        if self.pass_ == "training":
            return training
        outs = training()
        given = [inputs.dy] * len(outs)
        return lambda: torch.autograd.grad(outs, [*leaves.values()], given, retain_graph=True)

    def check(self, provider: Provider, runner: Callable, inputs: Inputs) -> float:
        """Against stock torch in float64. Where a mask must be drawn again, or tokens are packed,
        against our torch backend in float64, which runs the reference. A function that computes
        something else names its `reference` among the case's."""
        device = inputs.dy.device.type
        if provider.ours:
            backend, few = self.budget_of(provider, device)
            if backend != "torch":
                within_budget(self.op, backend, few, self.dtype, device)
        # Others draw a mask of their own, so their arithmetic is checked without.
        case = self
        if self.dropout and not provider.ours:
            case = dataclasses.replace(self, dropout=0.0)  # type: ignore[type-var]
        given = inputs.of(runner)
        again = case.dropout or given is not inputs
        exact = self.functions[getattr(runner, "reference", self.exact or self.stock)]
        oracle = self.functions["bertfast"]("torch") if again else exact
        right = case.step(oracle, given.double())()
        pairs = zip(case.step(runner, given)(), right, strict=True)
        return held(max(relative(*pair) for pair in pairs), LIMITS[self.dtype])


def _outputs(made: Any) -> tuple[torch.Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


@functools.cache
def within_budget(op: str, backend: str, case: Any, dtype: torch.dtype, device: str) -> None:
    """Holds a backend to the error budget, output and every gradient, on a few rows: once for each
    dtype and form, such as a width. The torch backend's backward is stock torch's."""
    testing = importlib.import_module(f"bertfast.testing.{op}")
    inputs = testing.make_inputs(case, dtype)
    worst = nearest_to_budget(testing, inputs, testing.run(inputs, backend, device))
    if not worst.ok:
        raise Wrong(str(worst))


def dropout_seed(device: str, seed: int) -> torch.Tensor:
    return torch.tensor([seed + 12345], device=device)
