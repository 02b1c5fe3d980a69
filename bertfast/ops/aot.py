"""How an op describes its kernels to `bertfast kernels`, which compiles and reads them.

An op folder's `aot.py` has `triton_cases()`, the Triton kernels in the forms in which they matter
(`triton_cases(capability)` where their configurations depend on the architecture), and
`cuda_case()`, which says what an instance of a CUDA template is. So a new op needs no change
anywhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One form of a kernel: what its compiled code is measured against."""

    label: str  # the configuration, in words
    dtypes: str  # "float16", or "bfloat16->float32" where x has another dtype than the rest
    threads: int  # of a block
    elements: float | None  # of a row tensor, a thread's: in the kernel, or in one turn of its loop
    loop: bool = False  # the longest loop is what counts, the rest is run once
    again: bool = False  # that loop is inside another, of what is rarely done again
    scalar_loads: int = 0  # loads that are not row data: the seed, a row's statistics
    scalar_stores: int = 0
    dynamic_shared: int = 0  # bytes; of a Triton kernel the compiler knows


@dataclass(frozen=True)
class TritonCase:
    """A Triton kernel and what it is called with.

    arguments: for each parameter a type ("*fp16", "i32"; with ":16" if it is divisible by 16, which
    is how a launch specialises it), or, for a constexpr and for an absent pointer, the value.
    """

    kernel: Any  # a triton.JITFunction
    arguments: Mapping[str, str | int | None]
    num_warps: int
    case: Case
