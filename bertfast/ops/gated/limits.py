"""Limits of gated: these activations; of its kernels any shape, in these dtypes."""

import torch

# csrc/params.h numbers them in this order.
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_reason(dtype: torch.dtype | None) -> str | None:
    if dtype is not None and dtype not in DTYPES:
        return f"x must be float32, float16 or bfloat16, got {dtype}"
    return None
