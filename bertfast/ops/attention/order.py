"""The backends that "auto" tries for attention on a GPU, by architecture and head dimension.

The first line that serves a call decides, after what `bertfast tune` has measured on the very GPU,
and says what it rests on. "machine code": counts of `bertfast kernels`, which `--model` weighs; no
GPU has measured them yet. A key_mask makes no difference here: with one, the two are nearer to each
other on sm_90 than the model is to published speeds.
"""

from typing import Any, NamedTuple

import torch

from . import limits


class Line(NamedTuple):
    order: tuple[str, ...]
    evidence: str
    capabilities: tuple[int, ...] = ()  # any, if none is named
    width: int = limits.MAX_HEAD_DIM  # up to this head dimension


_TRITON_FIRST = ("triton", "cuda", "torch")
_CUDA_FIRST = ("cuda", "triton", "torch")

LINES = (
    Line(
        _TRITON_FIRST,
        "machine code: by wgmma 9.1 instructions a score in the forward and 16.4 in the backward, "
        "12 and 38 bytes of shared memory; CUDA beyond 128 tokens 8.4 and 17.8, 5 and 27, but "
        "shorter sequences by mma.sync",
        (90,),
        width=64,
    ),
    Line(
        _CUDA_FIRST,
        "machine code: with dropout, dkv takes 73 instructions a score in Triton and 46 in CUDA",
        (90,),
    ),
    Line(
        _CUDA_FIRST,
        "machine code: both by mma.sync; dkv, with and without dropout, takes 26 and 51 "
        "instructions a score in Triton, 18 and 32 in CUDA",
        (80, 86, 87, 89, 120, 121),
    ),
    Line(_CUDA_FIRST, "not measured; the compiled kernels have the lower call cost"),
)


def line(capability: int, head_dim: int | None) -> Line:
    """head_dim: None if it isn't known."""
    for one in LINES:
        fits = head_dim is None or head_dim <= one.width
        if fits and (not one.capabilities or capability in one.capabilities):
            return one
    return LINES[-1]


def order(device: torch.device, dtype: Any = None, head_dim: int | None = None, *_: Any) -> tuple:
    """For a GPU and a case as `unsupported_reason` is given it."""
    major, minor = torch.cuda.get_device_capability(device)
    return line(10 * major + minor, head_dim).order
