"""Limits of attention's kernels. Their table of splits serves every length."""

from typing import TypeAlias

import torch

# In CUDA C++ tensor cores would round float32 to TF32.
DTYPES = {
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
}
# What the kernels can do to scores, by the names of the public functions' arguments, and whether
# they have such a call's gradients, without which "auto" may take another backend.
BACKWARD = "backward"
FEATURES: dict[str, tuple[str, ...]] = {
    "triton": ("rotary", "window", "distance_bias", BACKWARD),
    "cuda": ("rotary", "window", "distance_bias", BACKWARD),
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

# Lengths up to which "auto" and tuned splits tell calls apart, by the longest sequence.
LENGTHS = (64, 128, 256, 512, MAX_MASKED_LENGTH)

# Of LENGTHS the one that serves a call; or sequences, heads, length and whether there is a key_mask
Size: TypeAlias = int | tuple[int, int, int, bool]


def length_class(longest: int) -> int:
    return next((length for length in LENGTHS if longest <= length), LENGTHS[-1])


def size_of(sequences: int, heads: int, length: int, masked: bool, longest: int) -> Size:
    """All of it for a call that may be beyond a limit, which hardly any is. length: of a packed
    batch as packed_length says; longest: of the longest sequence."""
    if length <= MAX_MASKED_LENGTH and sequences * heads * (length + 128) <= MAX_POSITIONS:
        return length_class(longest)
    return sequences, heads, length, masked


def packed_length(tokens: int, sequences: int) -> int:
    """The length of the one sequence that takes as many tiles as a packed batch may: a plan's tiles
    of 64 are full but for the last of each sequence."""
    return tokens + 64 * sequences


def unsupported_reason(
    backend: str,
    dtype: torch.dtype | None,
    head_dim: int | None,
    size: Size | None,
    features: tuple[str, ...] = (),
) -> str | None:
    """features: those of FEATURES that are asked for."""
    if dtype is not None and dtype not in DTYPES[backend]:
        return _WRONG_DTYPE[backend].format(dtype)
    if head_dim is not None and not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"the head dimension must be between 1 and {MAX_HEAD_DIM}, got {head_dim}"
    missing = [name for name in features if name not in FEATURES[backend]]
    if missing:
        return f"its kernels don't have {' and '.join(missing)} yet"
    if size is None or isinstance(size, int):
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
