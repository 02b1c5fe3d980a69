"""The kernels of a product and its gated activation as `bertfast kernels` compiles and labels them.

They are those of a product and its GELU, with another epilogue, and so are their cases.
"""

import re

import torch

from .. import triton_lib
from ..aot import CUDA_NAMES, Case
from ..linear import aot as linear
from ..linear import config
from ..linear.aot import triton_case
from . import run

__all__ = ["call_launchers", "cuda_case", "triton_case"]

# A form serves all sizes, so one of each suffices: those of NomicBERT, and inputs that aren't a
# multiple of a step.
ROWS, INPUTS, WIDTH = 16384, 768, 3072


def call_launchers() -> None:
    """Everything with the exact GELU in bfloat16; of the rest what saves u for a backward, as it
    has more to do."""
    _call(torch.bfloat16, INPUTS, saves=(False, True))
    for activation in ("gelu_tanh", "silu"):
        _call(torch.bfloat16, INPUTS, activation)
    _call(torch.float16, INPUTS)
    _call(torch.bfloat16, INPUTS + 8)
    arch = config.architecture(triton_lib.capability_without_device.get())
    for pass_ in config.GATED:
        for other in config.candidates(arch, pass_)[1:]:
            with config.trial(pass_, other):
                _call(torch.bfloat16, INPUTS, saves=(False, True))


def _call(
    dtype: torch.dtype, inputs: int, activation: str = "gelu", saves: tuple[bool, ...] = (True,)
) -> None:
    choice = run.Choice("triton", "triton", "triton")
    bias = torch.empty(2 * WIDTH, dtype=dtype)
    x, up = (torch.empty(size, inputs, dtype=dtype) for size in (ROWS, 2 * WIDTH))
    down, u = torch.empty(inputs, WIDTH, dtype=dtype), torch.empty(ROWS, 2 * WIDTH, dtype=dtype)
    for save in saves:
        run.forward(x, up, bias, activation, choice, save)
    run.backward(x, down, u, bias, activation, True, choice)


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """The case of a template instance of csrc/kernels/linear_gated.cu, if it is one.

    Which activation is a branch at run time. What follows the main loop is counted on the cheaper
    way, that of a sigmoid: exact GELU takes as many instructions, in the backward 3 % more.
    """
    found = re.fullmatch(r"linear_gated_(forward|backward)_kernel", kernel)
    if found is None:
        return None
    dtype, most_outside = CUDA_NAMES[arguments[0]], linear.MOST_OUTSIDE_GATED[found[1]]
    if found[1] == "forward":  # y, and u, as wide as the sums
        return linear.by_warps(int(arguments[1]), "", dtype, 0.5 + 1, most_outside)
    return linear.by_warps(128, "", dtype, 2, most_outside)
