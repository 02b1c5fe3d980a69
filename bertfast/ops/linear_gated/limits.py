"""Limits of the kernels that make a product and its gated activation at once."""

import torch

from ..linear import limits as linear

MAX_WIDTH = linear.MAX_WIDTH // 2  # of each half


def unsupported_reason(
    dtype: torch.dtype | None = None,
    inputs: int | None = None,
    outputs: int | None = None,
    rows: int | None = None,
    pass_: str | None = None,
) -> str | None:
    """outputs: the width of y, half of the forward product's. pass_: "backward" for the other half
    of training, which has the same limits."""
    if outputs is not None and outputs > MAX_WIDTH:
        return f"outputs must be at most {MAX_WIDTH}, got {outputs}"
    return linear.unsupported_reason(dtype, inputs, outputs, rows, pass_)
