"""y = LayerNorm(dropout(x + x_bias) + residual) * weight + bias, as in an encoder layer; with the
sum as well, as where the norm comes first, and RMSNorm."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ....ops import layer_norm, rms_norm
from ....testing import layer_norm as testing
from ..case import normal
from ..floor import Work
from ..op_case import Inputs, OpCase, dropout_seed

EPS = 1e-12
Tensor = torch.Tensor


def _ours(backend: str) -> Callable:
    def run(x: Tensor, weight: Tensor, bias: Tensor, p: float = 0.0, **more: Any) -> Tensor:
        return layer_norm(x, weight, bias, eps=EPS, dropout_p=p, backend=backend, **more)

    return run


def _after_torch(norm: Callable) -> Callable:
    """Adds and drops by torch, then norm."""

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None = None,
        x_bias: Tensor | None = None,
        seed: Tensor | None = None,
        p: float = 0.0,
    ) -> Tensor:
        z = x if x_bias is None else x + x_bias
        if residual is not None:
            z = F.dropout(z, p, training=p > 0) + residual
        return norm(z, weight, bias)

    return run


def _torch_norm(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(z, weight.shape, weight, bias, EPS)


def _liger_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(z, weight, bias, EPS)


def _ours_with_sum(backend: str) -> Callable:
    def run(
        x: Tensor, weight: Tensor, p: float, rms: bool, bias: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, Tensor]:
        more |= dict(eps=EPS, dropout_p=p, return_sum=True, backend=backend)
        if rms:
            return rms_norm(x, weight, **more)
        return layer_norm(x, weight, bias, **more)

    return run


def _torch_with_sum(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    x_bias: Tensor,
    seed: Tensor,
    p: float,
    rms: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    z = F.dropout(x + x_bias, p, training=p > 0) + residual
    if rms:
        return F.rms_norm(z, weight.shape, weight, EPS), z
    return _torch_norm(z, weight, bias), z


@dataclass(frozen=True)
class LayerNormCase(OpCase):
    pass_: str
    rows: int
    width: int
    dtype: torch.dtype
    dropout: float = 0.0
    alone: bool = False  # nothing is added to x, so that it is one call of stock torch's, too

    op = "layer_norm"
    functions = {
        "bertfast": _ours,
        "torch eager": _after_torch(_torch_norm),
        "Liger": _after_torch(_liger_norm),
    }

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}" + (" alone" if self.alone else "")

    def options(self) -> dict[str, float]:
        return {} if self.alone else {"p": self.dropout}

    def work(self) -> list[Work]:
        """The least that must go through memory.

        forward    values an element: x and residual read, y written                       3
        training   and z written; mean and rstd (float32) are one value a row              4
        backward   dy and z read, dz (both dx and dresidual) written                       3
                   with dropout dx differs from dresidual: written too                     4
        alone      there is no residual, and z is x: 2, 2, 3
        Parameters and their gradients are one row each, counted; the partial sums, which are a
        choice of the implementation, are not. The dropout mask moves nothing: it is computed.
        """
        values = {"forward": 3, "training": 4, "backward": 4 if self.dropout else 3}[self.pass_]
        parameter_rows = {"forward": 3, "training": 3, "backward": 4}[self.pass_]
        if self.alone:
            values = {"forward": 2, "training": 2, "backward": 3}[self.pass_]
            parameter_rows -= 1
        statistics = 0 if self.pass_ == "forward" else 2 * 4 * self.rows
        rows = values * self.rows + parameter_rows
        return [Work("memory", 0, rows * self.width * self.dtype.itemsize + statistics)]

    def moves(self) -> dict[str, tuple[int, float]]:
        """Without a mask to draw stock torch takes a kernel for x_bias, for the residual and for
        the norm; compiled, one. A backward's sums over the rows take a kernel more."""
        (work,) = self.work()
        found: dict[str, tuple[int, float]] = {
            "bertfast": (2 if self.pass_ == "backward" else 1, work.bytes)
        }
        if self.pass_ == "forward" and not self.dropout:
            tensor = self.rows * self.width * self.dtype.itemsize
            found["torch compile"] = (1, (2 if self.alone else 3) * tensor)
            found["torch eager"] = (1, 2 * tensor) if self.alone else (3, 7 * tensor)
        return found

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        shape, width = (self.rows, self.width), self.width
        leaves = {"x": values(*shape), "weight": 1 + 0.1 * values(width), "bias": values(width)}
        if self.alone:
            return Inputs(leaves, values(*shape))
        leaves |= {"residual": values(*shape), "x_bias": values(width)}
        return Inputs(leaves, values(*shape), {"seed": dropout_seed(device, seed)})

    def for_budget(self) -> testing.Case:
        added = not self.alone
        return testing.Case((67, self.width), residual=added, x_bias=added, p=self.dropout)


@dataclass(frozen=True)
class WithSum(LayerNormCase):
    """Each part writes, or reads, the sum besides: of a forward in training it is what is saved."""

    rms: bool = False
    bias: bool = True  # of a LayerNorm

    functions = {"bertfast": _ours_with_sum, "torch eager": _torch_with_sum}

    @property
    def shape(self) -> str:
        name = f"{self.rows}x{self.width} with sum"
        return name + (" rms" if self.rms else "" if self.bias else " without bias")

    def options(self) -> dict[str, Any]:
        return {"p": self.dropout, "rms": self.rms}

    def work(self) -> list[Work]:
        """One value an element more than without the sum, but in training, where z is the sum.
        Without a bias there is neither that nor its gradient, and RMSNorm has no mean either."""
        (work,) = super().work()
        tensor = self.rows * self.width * self.dtype.itemsize
        more = 0 if self.pass_ == "training" else tensor
        if self.rms or not self.bias:
            more -= self.width * self.dtype.itemsize
        if self.rms and self.pass_ != "forward":
            more -= 4 * self.rows
        return [Work("memory", 0, work.bytes + more)]

    def moves(self) -> dict[str, tuple[int, float]]:
        return {"bertfast": super().moves()["bertfast"]}

    def inputs(self, device: str, seed: int) -> Inputs:
        made = super().inputs(device, seed)
        if self.rms or not self.bias:
            del made.leaves["bias"]
        return made

    def for_budget(self) -> testing.Case:
        rest: dict[str, Any] = {"bias": self.bias, "rms": self.rms, "return_sum": True}
        return testing.Case((67, self.width), p=self.dropout, **rest)


_PASSES = (
    ("forward", 0.0),
    ("training", 0.1),
    ("backward", 0.1),
    ("training", 0.0),
    ("backward", 0.0),
)


def gpu_cases() -> list[LayerNormCase]:
    """BERT-base's width at a full batch in bf16, then outward."""
    widths, all_rows = (768, 1024, 384), (128, 4096, 24576)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    order = itertools.chain(
        itertools.product((16384,), widths, (bf16, fp16)),
        itertools.product(all_rows, widths, (bf16,)),
        itertools.product((16384,), widths, (fp32,)),
        itertools.product(all_rows, widths, (fp16, fp32)),
    )
    usual = [
        LayerNormCase(pass_, rows, width, dtype, p)
        for rows, width, dtype in order
        for pass_, p in _PASSES
    ]
    sums = [
        WithSum(pass_, 16384, 768, bf16, p, rms=rms)
        for rms in (False, True)
        for pass_, p in _PASSES
    ]
    without = [pass_ for pass_, p in _PASSES if p == 0]  # ModernBERT, which has no dropout either
    return usual + sums + [WithSum(pass_, 16384, 768, bf16, bias=False) for pass_ in without]


def cpu_cases() -> list[LayerNormCase]:
    """MiniLM's and BERT-base's widths."""
    order = (("forward", 384), ("forward", 768), ("backward", 768))
    return [LayerNormCase(pass_, 4096, width, torch.float32) for pass_, width in order]


def dry_cases() -> list[LayerNormCase]:
    dtypes = itertools.cycle((torch.float32, torch.float16, torch.bfloat16))
    forms = [(*form, False) for form in _PASSES]
    forms += [(*form, True) for form in _PASSES[:1] + _PASSES[3:]]
    usual = [
        LayerNormCase(pass_, 6, 64, dtype, p, alone)
        for (pass_, p, alone), dtype in zip(forms, dtypes, strict=False)
    ]
    sums = ((*_PASSES[0], False), (*_PASSES[2], True))
    made = [
        WithSum(pass_, 6, 64, dtype, p, rms=rms)
        for (pass_, p, rms), dtype in zip(sums, dtypes, strict=False)
    ]
    return [*usual, *made, WithSum("backward", 6, 64, torch.float16, bias=False)]
