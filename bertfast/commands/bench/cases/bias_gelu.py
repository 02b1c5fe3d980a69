"""y = gelu(x + bias), as between the two Linears of an encoder layer's feed-forward part."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ....ops import bias_gelu
from ....testing import bias_gelu as testing
from ..case import normal
from ..floor import Work
from ..op_case import Inputs, OpCase


def _ours(backend: str) -> Callable:
    return functools.partial(bias_gelu, backend=backend)


def _stock(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x + bias)


@dataclass(frozen=True)
class BiasGeluCase(OpCase):
    pass_: str  # forward (in training too: nothing more is saved) or backward
    rows: int
    width: int
    dtype: torch.dtype

    op = "bias_gelu"
    functions = {"bertfast": _ours, "torch eager": _stock}
    dropout = 0.0

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}"

    def work(self) -> list[Work]:
        """The least that must go through memory.

        forward    values per element: x read, y written; the backward needs x alone           2
        backward   dy and x read, dx written                                                   3
        The bias is one row, and so is its gradient; the partial sums are not counted.
        """
        values, parameter_rows = {"forward": (2, 1), "backward": (3, 2)}[self.pass_]
        rows = values * self.rows + parameter_rows
        return [Work("memory", 0, rows * self.width * self.dtype.itemsize)]

    def moves(self) -> dict[str, tuple[int, float]]:
        """Stock torch writes x + bias, and reads it again; in the backward it reads dx again for
        its sum. A backward's sums over the rows take a kernel more."""
        tensor = self.rows * self.width * self.dtype.itemsize
        if self.pass_ == "backward":
            return {"bertfast": (2, 3 * tensor), "torch eager": (2, 4 * tensor)}
        one = (1, 2 * tensor)
        return {"bertfast": one, "torch compile": one, "torch eager": (2, 4 * tensor)}

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        leaves = {"x": values(self.rows, self.width), "bias": values(self.width)}
        return Inputs(leaves, values(self.rows, self.width))

    def for_budget(self) -> testing.Case:
        return testing.Case((67, self.width))


def gpu_cases() -> list[BiasGeluCase]:
    """BERT-base's inner width at a full batch in bf16, then outward."""
    order = itertools.chain(
        itertools.product((16384,), (3072, 4096, 1536), (torch.bfloat16, torch.float16)),
        itertools.product((128, 4096), (3072,), (torch.bfloat16,)),
        itertools.product((16384,), (3072,), (torch.float32,)),
    )
    return [
        BiasGeluCase(pass_, rows, width, dtype)
        for rows, width, dtype in order
        for pass_ in ("forward", "backward")
    ]


def cpu_cases() -> list[BiasGeluCase]:
    """MiniLM's and BERT-base's sizes."""
    order = (("forward", 1536), ("forward", 3072), ("backward", 3072))
    return [BiasGeluCase(pass_, 1024, width, torch.float32) for pass_, width in order]


def dry_cases() -> list[BiasGeluCase]:
    return [
        BiasGeluCase("forward", 6, 64, torch.bfloat16),
        BiasGeluCase("backward", 6, 64, torch.float16),
    ]
