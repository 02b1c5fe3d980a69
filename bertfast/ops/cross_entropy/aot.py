"""The kernels between linear_cross_entropy's products as `bertfast kernels` compiles and labels
them."""

import torch

from ..aot import DTYPES, Case, Launch
from . import limits, triton

# BERT's vocabulary, which is no multiple of a tile, and its rows of a chunk on a GPU.
VOCABULARY = 30522
ROWS = 2736


def call_launchers() -> None:
    for dtype, _ in DTYPES:
        for smoothing in (0.0, 0.1):
            _call(dtype, smoothing)
        _call(dtype, 0.0, biased=False)
        _call(dtype, 0.1, biased=False, weighted=True)
        _call(dtype, 0.0, frozen=True)
        _call(dtype, 0.1, weighted=True)


def _call(
    dtype: torch.dtype,
    smoothing: float,
    biased: bool = True,
    frozen: bool = False,
    weighted: bool = False,
) -> None:
    wide = -(-VOCABULARY // limits.MULTIPLE) * limits.MULTIPLE
    z = torch.empty(ROWS, wide)[:, :VOCABULARY]
    dz = z if dtype == z.dtype else torch.empty(ROWS, wide, dtype=dtype)[:, :VOCABULARY]
    bias = torch.empty(wide, dtype=dtype) if biased else None
    labels, losses = torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS)
    scale = torch.empty(ROWS) if weighted else None
    dbias = torch.empty(wide) if biased and not frozen else None
    triton.forward(z, bias, labels, smoothing, losses, scale, dz, dbias)


def triton_case(launch: Launch) -> Case | None:
    if launch.name == "column_sum_kernel":
        return None  # layer_norm's is the same
    values, biased = launch.values, launch.has("bias_ptr")
    label = "" if biased else ", no bias"
    if launch.name == "cross_entropy_loss_kernel":
        label = f"{values['BLOCK_N']}" + label + ", smoothed" * values["SMOOTHED"]
        rest = "bias_ptr" if biased else "z_ptr"
        return launch.case(label, "z_ptr", rest, values["BLOCK_N"], loop=True)
    label = f"{values['ROWS']} x {values['BLOCK_N']}" + label
    label += ", frozen bias" * (biased and not launch.has("dbias_ptr"))
    label += ", weighted" * launch.has("scale_ptr")
    elements = values["ROWS"] * values["BLOCK_N"]
    # Of each row its label, its lse and what its loss counts.
    loads = values["ROWS"] * (2 + launch.has("scale_ptr"))
    return launch.case(label, "z_ptr", "dz_ptr", elements, loop=True, scalar_loads=loads)


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """There are none in CUDA C++."""
    return None
