"""Limits of bias_gelu's kernels: any shape, in these dtypes."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_reason(dtype: torch.dtype | None) -> str | None:
    if dtype is not None and dtype not in DTYPES:
        return f"x must be float32, float16 or bfloat16, got {dtype}"
    return None
