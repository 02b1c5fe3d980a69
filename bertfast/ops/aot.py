"""How an op describes its kernels to `bertfast kernels`, which compiles and reads them.

An op folder's `aot.py` has three functions, so a new op needs no change anywhere else:

    call_launchers()     calls the Triton launchers in the forms that matter. Its tensors have no
                         memory: what would be launched is compiled instead.
    triton_case(launch)  what such a launch is; None if it isn't to be read
    cuda_case(kernel, template_arguments)    what an instance is; None if it isn't one of the op's
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Of x and of everything else, for the ops where these may differ.
DTYPES = [(dtype, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
MIXED = (torch.bfloat16, torch.float32)
CUDA_NAMES = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Work:
    """The products of a block with tensor cores in one turn of its main loop.

    In the words of attention, whose scores are the sums of a turn.
    """

    rows: int  # of the scores that it computes
    columns: int
    head_dim: int  # as multiplied: padded, if the kernel pads it
    products: tuple[tuple[int, int], ...]  # of each: rows, and multiply-adds in a sum
    streamed: int  # rows of two tiles that it loads
    dropout: bool = False
    scales: bool = False  # the sums so far, by a factor for each row
    turns: int = 1  # of a loop inside, with products, for one of the main loop
    wgmma: bool = False  # whether the tile is large enough for wgmma, where there is wgmma
    # Of a product whose sums, rows x columns, are written when the loop over its inner dimension is
    # done; head_dim is then what a turn takes of that dimension, and streamed what it loads of
    # rows and columns, on average.
    outputs: float = 0  # tensors of rows x columns values of 16 bits that are written then
    most_outside: float | None = None  # instructions outside the main loop for each of these sums


@dataclass(frozen=True)
class Case:
    """One form of a kernel: what its compiled code is measured against."""

    label: str  # the configuration, in words
    dtypes: str  # "float16", or "bfloat16->float32" where x has another dtype than the rest
    threads: int  # of a block
    elements: float | None  # of a row tensor, a thread's: in the kernel, or in one turn of its loop
    loop: bool = False  # the longest loop is what counts, the rest is run once
    again: bool = False  # that loop is inside another, of what is rarely done again
    loads_first: bool = False  # all loads are to be under way before the first exponential
    scalar_loads: int = 0  # loads that are not row data: the seed, a row's statistics
    scalar_stores: int = 0
    dynamic_shared: int = 0  # bytes; of a Triton kernel the compiler knows
    capability: int | None = None  # 90 for 9.0: elsewhere the kernel is empty; None: none is
    empty_on: int | None = None  # 90: on 9.0 the kernel is empty
    work: Work | None = None  # None: without products, or by other means than tensor cores

    def is_on(self, capability: int) -> bool:
        return self.capability in (None, capability) and self.empty_on != capability


@dataclass(frozen=True)
class Launch:
    """A Triton kernel as its launcher starts it."""

    kernel: Any  # a triton.JITFunction
    values: Mapping[str, Any]  # of its parameters
    threads: int  # of a block
    specialization: str  # what Triton compiles it for, in Triton's own words

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def has(self, pointer: str) -> bool:
        return self.values.get(pointer) is not None

    def case(self, label: str, x: str, rest: str, elements: int, **more: Any) -> Case:
        """x, rest: the pointers that have the dtypes. elements: a block's."""
        both = (str(self.values[name].dtype).removeprefix("torch.") for name in (x, rest))
        return Case(label, dtypes(*both), self.threads, elements / self.threads, **more)


def dtypes(x: str, rest: str) -> str:
    return rest if x == rest else f"{x}->{rest}"
