"""The backends that "auto" tries for attention on a GPU, by architecture and head dimension, and by
what is asked of scores.

The first line that serves a call decides, after what `bertfast tune` has measured on the very GPU,
and says what it rests on. "machine code": counts of `bertfast kernels`, which `--model` weighs; no
GPU has measured them yet. A key_mask makes no difference here: with one, the two are nearer to each
other on sm_90 than the model is to published speeds.

Calls by position, by that model: TFLOP/s of CUDA / Triton at 512 tokens, forward | backward. Of two
figures of Triton's forward the first is with a plan. Of a window of 64 to each side CUDA tests half
of a warp's steps, which takes 1.5 to 2.4 instructions a score more, and Triton all.

    heads of 64        A100                     H100
    window             132/91     | 105/71      261/154, 195 | 153/219
    window, dropout    111/67, 72 |  91/52      209/107, 153 | 132/159
    bias               108/64     |  94/63      216/109, 110 | 136/156
    bias, dropout       94/55     |  84/51      179/98       | 120/129
    rotary               -        | 115/76      as calls without
    heads of 32
    window              66/73, 87 |  53/69      130/119, 129 |  76/145
    bias                54/17, 18 |  47/50      108/26, 28   |  68/96
    rotary               -        | 133/78      as calls without
    rotary, below 32     -        |  54/78

On an H100 a window's forward alone is faster in CUDA. Both passes together are faster in Triton, by
10 to 22 %; with dropout the model can't tell, which is up to 13 % off published speeds. A bias's
gradient comes on top, by a kernel that moves 8.5 bytes of L2 a score in CUDA and 13 to 21 in
Triton. CUDA's kernels by position have none for heads of 32, which are done as those of 64 with
zeros; rotary positions need them of narrower heads alone, or where a GPU isn't full. With heads of
128 CUDA is ahead or, in a window's forward on an H100, no further behind than the model can tell
(11 to 14 %).
"""

from typing import Any, NamedTuple

import torch

from . import limits


class Line(NamedTuple):
    order: tuple[str, ...]
    evidence: str
    capabilities: tuple[int, ...] = ()  # any, if none is named
    width: int = limits.MAX_HEAD_DIM  # up to this head dimension
    features: tuple[str, ...] = ()  # if any are named, calls by position with one of them alone
    backward: bool | None = None  # of those the ones with gradients, or without; None: all


_TRITON_FIRST = ("triton", "cuda", "torch")
_CUDA_FIRST = ("cuda", "triton", "torch")
_BY_MMA_SYNC = (80, 86, 87, 89, 120, 121)

LINES = (
    Line(
        _CUDA_FIRST,
        "machine code: with a bias the forward takes 23 instructions a score on sm_90a and 26 on "
        "sm_80 in Triton, and 13 and 16 in CUDA, with 4 more for the bias",
        (90, *_BY_MMA_SYNC),
        features=("distance_bias",),
    ),
    Line(
        _CUDA_FIRST,
        "machine code: with a window the forward takes 16.7 instructions a score in Triton, and in "
        "CUDA 12.9, or 15.3 where it tests; the backward 26.8 and 42.4",
        (90,),
        features=("window",),
        backward=False,
    ),
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
        _TRITON_FIRST,
        "machine code: with a window, heads of 32 take 17, 14 and 17 instructions a score in "
        "Triton's three kernels, and in CUDA's what those of 64 take, 16, 18 and 26",
        _BY_MMA_SYNC,
        width=32,
        features=("window",),
    ),
    Line(
        _TRITON_FIRST,
        "machine code: with rotary positions, heads below 32 take 8 and 12 instructions a score in "
        "Triton's dq and dkv, as those of 32 do, and in CUDA what those of 64 take, 18 and 26",
        _BY_MMA_SYNC,
        width=31,
        features=("rotary",),
        backward=True,
    ),
    Line(
        _CUDA_FIRST,
        "machine code: both by mma.sync; dkv, with and without dropout, takes 26 and 51 "
        "instructions a score in Triton, 18 and 32 in CUDA",
        _BY_MMA_SYNC,
    ),
    Line(_CUDA_FIRST, "not measured; the compiled kernels have the lower call cost"),
)


def line(capability: int, head_dim: int | None, asked: tuple[str, ...] = ()) -> Line:
    """head_dim: None if it isn't known. asked: of limits.FEATURES."""
    backward = limits.BACKWARD in asked
    for one in LINES:
        fits = head_dim is None or head_dim <= one.width
        fits = fits and (not one.capabilities or capability in one.capabilities)
        fits = fits and (not one.features or any(name in asked for name in one.features))
        if fits and one.backward in (None, backward):
            return one
    return LINES[-1]


def order(
    device: torch.device,
    dtype: Any = None,
    head_dim: int | None = None,
    size: Any = None,
    features: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """For a GPU and a case as `unsupported_reason` is given it."""
    major, minor = torch.cuda.get_device_capability(device)
    return line(10 * major + minor, head_dim, features).order
