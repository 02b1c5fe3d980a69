"""y = act(g) * v, g and v the halves of x weight^T + bias: the first part of a GeGLU or SwiGLU MLP,
in one kernel or two.

Forward and backward are the calls of a layer's node, as of a product with a GELU (linear_gelu.py),
whose cases these are with two columns of the product, u, for one of y.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ....ops import linear_gated
from ....ops.gated.reference import act
from ....ops.linear_gated import run
from ....testing import linear_gated as testing
from ..case import Step, normal
from ..op_case import Inputs
from ..predicted import Counts, Product
from ..providers import Provider
from . import linear_gelu
from .linear_gelu import PASSES, TWO_KERNELS, LinearGeluCase

Tensor = torch.Tensor


# Forward


def _ours(backend: str) -> Callable:
    fused = backend != "torch"

    def call(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        options: Any = dict(activation=activation, fused=fused, backend=backend)
        return linear_gated(x, weight, bias, **options)

    return call


def _two_kernels(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return linear_gated(x, weight, bias, activation=activation, fused=False)


def _auto(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return linear_gated(x, weight, bias, activation=activation)


def _gated(both: Tensor, activation: str) -> Tensor:
    gate, value = both.chunk(2, -1)
    return act(gate, activation) * value


def _stock(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return _gated(F.linear(x, weight, bias), activation)


# Backward. v is u + bias, rounded: what is saved by all but our kernels.


def _ours_backward(backend: str) -> Callable:
    if backend == "torch":
        return _stock_backward
    choice = run.Choice(backend, None, backend)

    def call(dy: Tensor, down: Tensor, u: Tensor, bias: Tensor, v: Tensor, activation: str) -> Any:
        return run.backward(dy, down, u, bias, activation, True, choice)

    return call


def _two_kernels_backward(
    dy: Tensor, down: Tensor, u: Tensor, bias: Tensor, v: Tensor, activation: str
) -> Any:
    backend = linear_gelu.after("gated", dy.device, dy.dtype)
    if backend == "torch":
        return _stock_backward(dy, down, u, bias, v, activation)
    return run.backward(dy, down, u, bias, activation, True, run.Choice(backend))


def _stock_backward(
    dy: Tensor, down: Tensor, u: Tensor, bias: Tensor, v: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    dh = dy @ down
    gate, value = v.chunk(2, -1)
    dgate = dh * value
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(dgate, gate)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dgate = torch.ops.aten.gelu_backward(dgate, gate, approximate=approximate)
    du = torch.cat((dgate, dh * act(gate, activation)), -1)
    return du, du.sum(0)


def _exact_backward(
    dy: Tensor, down: Tensor, u: Tensor, bias: Tensor, v: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    return _stock_backward(dy, down, u, bias, u + bias, activation)


@dataclass(frozen=True)
class LinearGatedCase(LinearGeluCase):
    activation: str = "gelu"

    op = "linear_gated"
    after = "gated"
    halves = 2
    functions = {
        "bertfast": _ours,
        "bertfast auto": _auto,
        f"bertfast {TWO_KERNELS}": _two_kernels,
        "torch eager": _stock,
        "torch compile max": _stock,
        "exact": _stock,
    }

    @property
    def shape(self) -> str:
        return super().shape + f" {self.activation}" * (self.activation != "gelu")

    def options(self) -> dict[str, Any]:
        return {"activation": self.activation}

    def counts(self, provider: Provider) -> Counts | None:
        """A product whose epilogue does the rest, or a product and, in tensors of y's size,

        two kernels      forward u read, y written; backward dh and u read, du written
        torch eager      forward v read by halves, act(g) written, read, and y written
        A sum over the rows takes a kernel more. Of eager's backward, and of code that is compiled,
        the kernels aren't known.
        """
        tensor, backward = self.rows * self.inner, self.pass_ == "backward"
        eager = provider.name == "torch eager"
        if self.dtype.itemsize != 2 or (backward and eager):
            return None
        if provider.name in ("bertfast triton", "bertfast cuda"):
            # Beside the product's own: y in place of u, u too, or for dh u and du.
            extra, after, kernels = {"forward": -1, "training": 1, "backward": 3}, 0, 1
            in_product = extra[self.pass_]
        elif eager or provider.name == f"bertfast {TWO_KERNELS}":
            in_product, after, kernels = 0, 5 if eager or backward else 3, 3 if eager else 2
        else:
            return None
        columns = self.inner if backward else 2 * self.inner
        product = Product(self.rows, columns, self.width, in_product * tensor)
        return Counts(kernels + backward, 2 * after * tensor, 2, (product,))

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        leaves = {
            "x": values(self.rows, self.width),
            "weight": values(2 * self.inner, self.width) / self.width**0.5,
            "bias": values(2 * self.inner) * 0.1,
        }
        return Inputs(leaves, leaves["x"])

    def for_budget(self) -> Any:
        few = min(136, self.inner)
        return testing.Case(67, self.width, few, activation=self.activation)


@dataclass(frozen=True)
class LinearGatedBackwardCase(LinearGatedCase):
    functions = {
        "bertfast": _ours_backward,
        f"bertfast {TWO_KERNELS}": _two_kernels_backward,
        "torch eager": _stock_backward,
        "torch compile max": _stock_backward,
        "exact": _exact_backward,
    }

    @property
    def form(self) -> tuple:
        return *super().form, "backward"

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        leaves = {
            "dy": values(self.rows, self.width),
            "down": values(self.width, self.inner) / self.width**0.5,
            "u": values(self.rows, 2 * self.inner),
            "bias": values(2 * self.inner) * 0.1,
        }
        return Inputs(leaves, leaves["dy"], {"v": leaves["u"] + leaves["bias"]})

    def step(self, runner: Callable, inputs: Inputs) -> Step:
        def backward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return runner(**inputs.leaves, **inputs.more, **self.options())

        return backward


def case(
    pass_: str, rows: int, width: int, inner: int, dtype: torch.dtype, activation: str = "gelu"
) -> LinearGatedCase:
    made = LinearGatedBackwardCase if pass_ == "backward" else LinearGatedCase
    return made(pass_, rows, width, inner, dtype, activation)


def gpu_cases() -> list[LinearGatedCase]:
    """ModernBERT-base at a full batch in bf16, and NomicBERT, then outward."""
    bf16 = torch.bfloat16
    order = [(16384, 768, 1152, bf16, "gelu"), (16384, 768, 3072, bf16, "silu")]
    order += [(16384, 1024, 2624, bf16, "gelu"), (4096, 768, 1152, bf16, "gelu")]
    order += [(16384, 768, 1152, torch.float16, "gelu")]
    return [case(pass_, *sizes) for sizes in order for pass_ in PASSES]


def cpu_cases() -> list[LinearGatedCase]:
    """ModernBERT-base's size."""
    return [case(pass_, 512, 768, 1152, torch.float32) for pass_ in ("forward", "backward")]


def dry_cases() -> list[LinearGatedCase]:
    dtypes = itertools.cycle((torch.bfloat16, torch.float16))
    pairs = zip(PASSES, dtypes, strict=False)
    return [case(pass_, 6, 32, 64, dtype, "silu") for pass_, dtype in pairs]
