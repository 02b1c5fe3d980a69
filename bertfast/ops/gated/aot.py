"""gated's kernels as `bertfast kernels` compiles and labels them."""

import torch

from ..aot import CUDA_NAMES, DTYPES, Case, Launch, dtypes
from . import run
from .limits import ACTIVATIONS

WIDTHS = (1152, 2624, 3072)  # ModernBERT base and large; NomicBERT and GTE
MAIN_WIDTH = 3072  # where every form is compiled
ROWS = 16384


def call_launchers() -> None:
    for width in WIDTHS:
        for activation in ACTIVATIONS if width == MAIN_WIDTH else ("gelu",):
            for dtype, _ in DTYPES:
                _call(width, dtype, activation, biased=False)
                if width == MAIN_WIDTH:
                    _call(width, dtype, activation, biased=True)


def _call(width: int, dtype: torch.dtype, activation: str, biased: bool) -> None:
    x, dy = torch.empty(ROWS, 2 * width, dtype=dtype), torch.empty(ROWS, width, dtype=dtype)
    bias = torch.empty(2 * width, dtype=dtype) if biased else None
    run.forward(x, bias, activation, False, "triton")
    run.backward(dy, x, bias, activation, False, biased, "triton")


def triton_case(launch: Launch) -> Case | None:
    if launch.name == "column_sum_kernel":
        return None  # layer_norm's is the same
    values = launch.values
    label = f"{values['width']}, {values['ACTIVATION']}" + ", bias" * launch.has("bias_ptr")
    elements = values["ROWS"] * values["BLOCK_N"]
    if launch.name == "gated_bwd_kernel":
        return launch.case(label, "x_ptr", "dy_ptr", elements, loop=values["STEPS"] > 1)
    return launch.case(label, "x_ptr", "y_ptr", elements)


CUDA_THREADS = 256  # of a block, at most


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """The case of a template instance of csrc/kernels/gated.cu, if it is one."""
    if kernel not in ("gated_forward_kernel", "gated_backward_kernel"):
        return None
    dtype = CUDA_NAMES[arguments[0]]
    activation = ACTIVATIONS[int(arguments[1].rpartition(")")[2])]
    vec, rows = map(int, arguments[2:4])
    label = f"vec {vec} x {rows} rows, {activation}" + ", bias" * (arguments[4] == "true")
    return Case(
        label,
        dtypes(dtype, dtype),
        CUDA_THREADS,
        elements=vec * rows,
        loop=kernel == "gated_backward_kernel",
    )
