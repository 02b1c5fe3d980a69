"""y = gelu(x weight^T + bias): the product of a layer that its GELU follows, in one kernel or two.

Forward and backward are the calls of a layer's node. So the backward is a function of all that it
reads, and no derivative that autograd is asked for:

    forward    y; nothing is saved
    training   y, and u = x weight^T is saved; stock torch saves u + bias in its place
    backward   dv = (dy down) * gelu'(u + bias) and dbias, the sum of dv's rows
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ....ops import dispatch, linear_gelu
from ....ops.linear import limits, run
from ....testing import linear_gelu as testing
from ..case import Step, normal
from ..floor import Work
from ..op_case import Inputs, OpCase
from ..predicted import Counts, Product
from ..providers import Provider

Tensor = torch.Tensor
TWO_KERNELS = "two kernels"
TANH = "cuBLASLt, tanh GELU"


# Forward


def _ours(backend: str) -> Callable:
    fused = backend != "torch"

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gelu(x, weight, bias, fused=fused, backend=backend)

    return call


def _two_kernels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_gelu(x, weight, bias, fused=False)


def _auto(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_gelu(x, weight, bias)


def _stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def _tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _cublaslt(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Another function: it is held to the tanh form's numbers."""
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


_cublaslt.reference = TANH + " in float64"  # type: ignore[attr-defined]


def _quack(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In its default configuration. It saves u + bias."""
    from quack.gemm_interface import gemm_act

    save = x.requires_grad
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    options = dict(activation="gelu_erf", store_preact=save, tuned=False)
    return gemm_act(x, weight.t(), bias=bias, **options)[1]


# Backward. v is u + bias, rounded: what is saved by all but our kernels.


def _ours_backward(backend: str) -> Callable:
    if backend == "torch":
        return _stock_backward
    choice = run.Choice(backend, None, backend)

    def call(dy: Tensor, down: Tensor, u: Tensor, bias: Tensor, v: Tensor) -> Any:
        return run.backward(dy, down, u, bias, False, (True, True), choice)

    return call


def _two_kernels_backward(dy: Tensor, down: Tensor, u: Tensor, bias: Tensor, v: Tensor) -> Any:
    gelu = after("bias_gelu", dy.device, dy.dtype)
    if gelu == "torch":
        return _stock_backward(dy, down, u, bias, v)
    return run.backward(dy, down, u, bias, False, (True, True), run.Choice(gelu))


def _stock_backward(
    dy: Tensor, down: Tensor, u: Tensor, bias: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    dv = torch.ops.aten.gelu_backward(dy @ down, v)
    return dv, dv.sum(0)


def _exact_backward(
    dy: Tensor, down: Tensor, u: Tensor, bias: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    return _stock_backward(dy, down, u, bias, u + bias)


def _quack_backward(
    dy: Tensor, down: Tensor, u: Tensor, bias: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """It makes y again beside dv, and no sum over the rows."""
    from quack.gemm_interface import gemm_dact

    dv, _ = gemm_dact(dy, down, v, activation="gelu_erf", tuned=False)
    return dv, dv.sum(0)


def after(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend of the op that follows a product, as "auto" takes it."""
    return dispatch.choose(op, "auto", torch.device(device), dtype)


@dataclass(frozen=True)
class LinearGeluCase(OpCase):
    pass_: str
    rows: int
    width: int  # x's, and dy's
    inner: int  # y's
    dtype: torch.dtype

    op = "linear_gelu"
    after: ClassVar[str] = "bias_gelu"  # the op after a product of its own
    halves: ClassVar[int] = 1  # of u, for one of y
    exact = "exact"
    dropout = 0.0
    functions = {
        "bertfast": _ours,
        "bertfast auto": _auto,
        f"bertfast {TWO_KERNELS}": _two_kernels,
        "torch eager": _stock,
        "torch compile max": _stock,
        TANH: _cublaslt,
        "quack": _quack,
        "exact": _stock,
        TANH + " in float64": _tanh,
    }

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}x{self.inner}"

    @property
    def form(self) -> tuple:
        return self.dtype, self.width, self.inner, limits.rows_class(self.rows)

    def work(self) -> list[Work]:
        """One product, and what must go through memory beside it, in values:

        forward    x, weight and bias read, y written
        training   and u written
        backward   dy, down, u and bias read, dv and dbias written
        The partial sums of dbias are not counted.
        """
        halves, backward = self.halves, self.pass_ == "backward"
        wide = {"forward": 1, "training": 1 + halves, "backward": 2 * halves}[self.pass_]
        wide = wide * self.rows + halves * (2 if backward else 1)
        weight = (1 if backward else halves) * self.width * self.inner
        values = self.rows * self.width + weight + wide * self.inner
        return [Work("products", 2 * self.rows * weight, values * self.dtype.itemsize)]

    def counts(self, provider: Provider) -> Counts | None:
        """A product whose epilogue does the rest, or a product, and what is read and written
        after it:

        two kernels      forward u or v read, y written; backward dh and u or v read, dv written,
                         and by stock torch dv read again for its sum
        quack            in the backward y is written too, and dv read again for its sum
        A sum over the rows takes a kernel more. Compiled code isn't known: it may fuse some.
        """
        if self.dtype.itemsize != 2:
            return None
        tensor, backward = self.rows * self.inner, self.pass_ == "backward"
        fused = provider.name in ("bertfast triton", "bertfast cuda", TANH, "quack")
        if not fused and provider.name not in (f"bertfast {TWO_KERNELS}", "torch eager"):
            return None
        in_product = int(self.pass_ != "forward") if fused else 0
        after = 0 if fused else 3 if backward else 2
        if backward and provider.name in ("quack", "torch eager"):
            in_product, after = in_product + fused, after + 1
        product = Product(self.rows, self.inner, self.width, in_product * tensor)
        kernels = (1 if fused else 2) + backward
        return Counts(kernels, 2 * after * tensor, 2, (product,))

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        leaves = {
            "x": values(self.rows, self.width),
            "weight": values(self.inner, self.width) / self.width**0.5,
            "bias": values(self.inner) * 0.1,
        }
        return Inputs(leaves, leaves["x"])

    def for_budget(self) -> testing.Case:
        """A few columns of y, too: they are all made alike, and float64 is a CPU's work."""
        return testing.Case(67, self.width, min(264, self.inner))

    def budget_of(self, provider: Provider, device: str) -> tuple[str, testing.Case]:
        few = self.for_budget()
        if provider.backend not in (TWO_KERNELS, "auto"):
            return provider.backend, few
        return after(self.after, device, self.dtype), dataclasses.replace(few, kernels=2)


@dataclass(frozen=True)
class LinearGeluBackwardCase(LinearGeluCase):
    functions = {
        "bertfast": _ours_backward,
        f"bertfast {TWO_KERNELS}": _two_kernels_backward,
        "torch eager": _stock_backward,
        "torch compile max": _stock_backward,
        "quack": _quack_backward,
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
            "u": values(self.rows, self.inner),
            "bias": values(self.inner) * 0.1,
        }
        return Inputs(leaves, leaves["dy"], {"v": leaves["u"] + leaves["bias"]})

    def step(self, runner: Callable, inputs: Inputs) -> Step:
        def backward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return runner(**inputs.leaves, **inputs.more)

        return backward


def case(pass_: str, rows: int, width: int, inner: int, dtype: torch.dtype) -> LinearGeluCase:
    made = LinearGeluBackwardCase if pass_ == "backward" else LinearGeluCase
    return made(pass_, rows, width, inner, dtype)


PASSES = ("forward", "training", "backward")
BASE, LARGE = (768, 3072), (1024, 4096)


def gpu_cases() -> list[LinearGeluCase]:
    """BERT-base at a full batch in bf16, then outward."""
    bf16, fp16 = torch.bfloat16, torch.float16
    order = itertools.chain(
        itertools.product((16384, 4096, 24576), (BASE, LARGE), (bf16,)),
        itertools.product((16384,), (BASE,), (fp16,)),
    )
    return [case(pass_, rows, *sizes, dtype) for rows, sizes, dtype in order for pass_ in PASSES]


def cpu_cases() -> list[LinearGeluCase]:
    """MiniLM's and BERT-base's sizes."""
    order = (("forward", 384), ("forward", 768), ("backward", 384))
    return [case(pass_, 512, width, 4 * width, torch.float32) for pass_, width in order]


def dry_cases() -> list[LinearGeluCase]:
    dtypes = itertools.cycle((torch.bfloat16, torch.float16))
    return [case(pass_, 6, 32, 64, dtype) for pass_, dtype in zip(PASSES, dtypes, strict=False)]
