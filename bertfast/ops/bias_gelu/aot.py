"""bias_gelu's kernels as `bertfast kernels` compiles and labels them."""

from functools import partial

import torch

from ..aot import CUDA_NAMES, DTYPES, MIXED, Case, Launch, dtypes
from . import run

WIDTHS = (1536, 3072, 4096)
MAIN_WIDTH = 3072  # where every form is compiled
ROWS = 16384


def call_launchers() -> None:
    for width in WIDTHS:
        for forms in DTYPES + [MIXED] * (width == MAIN_WIDTH):
            for tanh in (False, True) if width == MAIN_WIDTH else (False,):
                _call(width, *forms, tanh=tanh)
    for forms in DTYPES:
        _call(MAIN_WIDTH, *forms, tanh=False, frozen=True)
        for tanh in (False, True):
            _call(None, *forms, tanh=tanh)


def _call(
    width: int | None, x_dtype: torch.dtype, dtype: torch.dtype, tanh: bool, frozen: bool = False
) -> None:
    """width: None for no bias."""
    rows = partial(torch.empty, (ROWS, width or 1024))
    bias = None if width is None else torch.empty(width, dtype=dtype)
    if not frozen:
        run.forward(rows(dtype=x_dtype), bias, tanh, "triton")
    sums = not frozen and bias is not None
    run.backward(rows(dtype=dtype), rows(dtype=x_dtype), bias, tanh, True, sums, "triton")


def triton_case(launch: Launch) -> Case | None:
    if launch.name == "column_sum_kernel":
        return None  # layer_norm's is the same
    values, biased = launch.values, launch.has("bias_ptr")
    label = (f"{values['width']}" if biased else "no bias") + ", tanh" * values["TANH"]
    elements = values["ROWS"] * values["BLOCK_N"]
    if launch.name == "bias_gelu_bwd_kernel":
        label += ", frozen bias" * (biased and not launch.has("dbias_ptr"))
        return launch.case(label, "x_ptr", "dy_ptr", elements, loop=values["STEPS"] > 1)
    # A tile narrower than the warps beside each other loads its biases once, in narrower pieces.
    narrow = biased and values["BLOCK_N"] < launch.threads * values["GROUP"]
    return launch.case(label, "x_ptr", "y_ptr", elements, scalar_loads=int(narrow))


CUDA_THREADS = 256  # of a block, at most


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """The case of a template instance of csrc/kernels/bias_gelu.cu, if it is one."""
    if kernel not in ("bias_gelu_forward_kernel", "bias_gelu_backward_kernel"):
        return None
    x, rest = (CUDA_NAMES[name] for name in arguments[:2])
    vec, rows = map(int, arguments[2:4])
    label = f"vec {vec} x {rows} rows" + ", tanh" * (arguments[4] == "true")
    if arguments[5:] == ["false"]:
        label += ", no bias"
    return Case(
        label,
        dtypes(x, rest),
        CUDA_THREADS,
        elements=vec * rows,
        loop=kernel == "bias_gelu_backward_kernel",
        loads_first=kernel == "bias_gelu_forward_kernel",
    )
