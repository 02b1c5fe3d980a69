"""y = act(u) * v of the halves of one product's output: GeGLU and SwiGLU feed-forward parts."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ....ops import gated
from ....ops.gated.reference import act
from ....testing import gated as testing
from ..case import normal
from ..floor import Work
from ..op_case import Inputs, OpCase


def _ours(backend: str) -> Callable:
    return functools.partial(gated, backend=backend)


def _stock(x: torch.Tensor, activation: str) -> torch.Tensor:
    u, v = x.chunk(2, -1)
    return act(u, activation) * v


@dataclass(frozen=True)
class GatedCase(OpCase):
    pass_: str  # forward (in training too: nothing more is saved) or backward
    rows: int
    width: int  # of the result
    dtype: torch.dtype
    activation: str = "gelu"

    op = "gated"
    functions = {"bertfast": _ours, "torch eager": _stock}
    dropout = 0.0

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}" + f" {self.activation}" * (self.activation != "gelu")

    def work(self) -> list[Work]:
        """The least that must go through memory, in values for each of the result.

        forward    both halves read, y written; the backward needs x alone                     3
        backward   dy and both halves read, both halves of dx written                          5
        """
        values = {"forward": 3, "backward": 5}[self.pass_]
        return [Work("memory", 0, values * self.rows * self.width * self.dtype.itemsize)]

    def moves(self) -> dict[str, tuple[int, float]]:
        """Stock torch writes act(u), and reads it again. In the backward it makes dv, and da on the
        way to du, each of two tensors, and copies du and dv beside each other."""
        tensor = self.rows * self.width * self.dtype.itemsize
        if self.pass_ == "backward":
            return {"bertfast": (1, 5 * tensor), "torch eager": (4, 13 * tensor)}
        one = (1, 3 * tensor)
        return {"bertfast": one, "torch compile": one, "torch eager": (2, 5 * tensor)}

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        return Inputs({"x": values(self.rows, 2 * self.width)}, values(self.rows, self.width))

    def options(self) -> dict[str, str]:
        return {"activation": self.activation}

    def for_budget(self) -> testing.Case:
        return testing.Case((67, self.width), activation=self.activation)


def gpu_cases() -> list[GatedCase]:
    """ModernBERT-base's inner width at a full batch in bf16, and NomicBERT's, then outward."""
    order = itertools.chain(
        [(16384, 1152, torch.bfloat16, "gelu"), (16384, 3072, torch.bfloat16, "silu")],
        [(16384, 1152, torch.float16, "gelu"), (16384, 2624, torch.bfloat16, "gelu")],
        [(128, 1152, torch.bfloat16, "gelu"), (16384, 1152, torch.float32, "gelu")],
    )
    return [GatedCase(pass_, *size) for size in order for pass_ in ("forward", "backward")]


def cpu_cases() -> list[GatedCase]:
    """ModernBERT-base's size."""
    return [GatedCase(pass_, 1024, 1152, torch.float32) for pass_ in ("forward", "backward")]


def dry_cases() -> list[GatedCase]:
    return [
        GatedCase("forward", 6, 64, torch.bfloat16),
        GatedCase("backward", 6, 64, torch.float16, "silu"),
    ]
