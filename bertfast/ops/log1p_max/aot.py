"""The kernel of linear_log1p_max as `bertfast kernels` compiles and labels it."""

import torch

from ...packing import Sequences
from ..aot import Case, Launch
from . import triton

# BERT's vocabulary, of which a chunk on a GPU has so many words.
VOCABULARY, WORDS = 30522, 5120
SEQUENCES, LENGTH = 32, 512


def call_launchers() -> None:
    """z is float32 whatever the operands are."""
    z = torch.empty(SEQUENCES * LENGTH, WORDS)
    top = torch.empty(SEQUENCES, VOCABULARY)[:, :WORDS]
    token = torch.empty(SEQUENCES, VOCABULARY, dtype=torch.int32)[:, :WORDS]
    bounds = torch.empty(SEQUENCES + 1, dtype=torch.int32)
    mask = torch.empty(SEQUENCES, LENGTH, dtype=torch.bool)
    for sequences in (Sequences(mask), Sequences(), Sequences(None, bounds, LENGTH)):
        triton.forward(z, sequences, top, token)


def triton_case(launch: Launch) -> Case | None:
    values = launch.values
    label = f"{values['ROWS']} x {values['BLOCK_N']}"
    label += ", packed" * launch.has("bounds_ptr") + ", masked" * launch.has("mask_ptr")
    elements = values["ROWS"] * values["BLOCK_N"]
    # Of each row whether it counts.
    loads = values["ROWS"] * launch.has("mask_ptr")
    return launch.case(label, "z_ptr", "top_ptr", elements, loop=True, scalar_loads=loads)


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """There are none in CUDA C++."""
    return None
