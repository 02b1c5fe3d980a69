"""Limits of the kernel between linear_log1p_max's product and its result."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_VOCABULARY = 2**30  # columns are numbered in 32 bits, with room for a tile
MULTIPLE = 16  # of the values from one row of z to the next


def unsupported_reason(dtype: torch.dtype | None, vocabulary: int | None) -> str | None:
    if dtype is not None and dtype not in DTYPES:
        return f"x must be float32, float16 or bfloat16, got {dtype}"
    if vocabulary is not None and not 1 <= vocabulary <= MAX_VOCABULARY:
        return f"the vocabulary must be between 1 and {MAX_VOCABULARY} words, got {vocabulary}"
    return None
