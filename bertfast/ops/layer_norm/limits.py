"""Limits of layer_norm's kernels."""

import torch

MAX_WIDTH = 8192  # a row fits into the registers of one block
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_reason(dtype: torch.dtype | None, width: int | None) -> str | None:
    if dtype is not None and dtype not in DTYPES:
        return f"x must be float32, float16 or bfloat16, got {dtype}"
    if width is not None and not 1 <= width <= MAX_WIDTH:
        return f"the width must be between 1 and {MAX_WIDTH}, got {width}"
    return None
