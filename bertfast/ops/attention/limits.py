"""Limits of attention's kernels. Their table of splits serves every length."""

import torch

# In CUDA C++ tensor cores would round float32 to TF32.
DTYPES = {
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
}
_WRONG_DTYPE = {
    "triton": "q must be float32, float16 or bfloat16, got {}",
    "cuda": "its tensor-core kernels take float16 and bfloat16, got {}",
}
MAX_HEAD_DIM = 128
# A kernel has a program for each head of each tile, a tile has 16 positions or more, and CUDA
# starts 2**31 - 1 programs at most.
MAX_POSITIONS = 2**35
# A block of the CUDA kernels keeps one bit for each key of a masked row in its shared memory.
MAX_MASKED_LENGTH = 2**17

# sequences, heads, length and whether there is a key_mask
Size = tuple[int, int, int, bool]


def unusual(sequences: int, heads: int, length: int, masked: bool) -> Size | None:
    """The size of a batch if it may be beyond a limit. None for nearly all: a backend that serves
    one of them serves all of them."""
    if length <= MAX_MASKED_LENGTH and sequences * heads * (length + 128) <= MAX_POSITIONS:
        return None
    return sequences, heads, length, masked


def packed_length(tokens: int, sequences: int) -> int:
    """The length of the one sequence that takes as many tiles as a packed batch may: a plan's tiles
    of 64 are full but for the last of each sequence."""
    return tokens + 64 * sequences


def unsupported_reason(
    backend: str, dtype: torch.dtype | None, head_dim: int | None, size: Size | None
) -> str | None:
    if dtype is not None and dtype not in DTYPES[backend]:
        return _WRONG_DTYPE[backend].format(dtype)
    if head_dim is not None and not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"the head dimension must be between 1 and {MAX_HEAD_DIM}, got {head_dim}"
    if size is None:
        return None
    sequences, heads, length, masked = size
    if backend == "cuda" and masked and length > MAX_MASKED_LENGTH:
        return f"a row with a key_mask must have at most {MAX_MASKED_LENGTH} tokens, got {length}"
    if sequences * heads * (length + 128) > MAX_POSITIONS:
        return (
            f"sequences * heads * (longest sequence + 128) must be at most {MAX_POSITIONS}, "
            f"got {sequences} * {heads} * {length + 128}"
        )
    return None
