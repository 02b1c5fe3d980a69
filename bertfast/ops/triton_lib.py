"""Functions of all Triton kernels: rounding stores, and dropout's draws for a row."""

import contextlib
import contextvars
import functools
import os

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from . import gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# In the interpreter a cast to bfloat16 truncates; there we round by bit arithmetic first.
_INTERPRETED = tl.constexpr(INTERPRETED)


@functools.cache
def unsupported_reason(device: str | torch.device) -> str | None:
    """Why Triton can't run kernels on this device; of a GPU without a number, the current."""
    where = torch.device(device)
    if where.type not in ("cuda", "cpu"):
        return f"Triton kernels run on 'cuda' and (interpreted) on 'cpu', not on {where.type!r}"
    if INTERPRETED:
        return None
    if where.type == "cpu":
        return (
            "on a CPU Triton runs only in its interpreter: "
            "set TRITON_INTERPRET=1 before bertfast is imported"
        )
    return gpu.unsupported_reason(where) or _why_no_driver()


def _why_no_driver() -> str | None:
    """Why Triton's own driver can't be had. It is compiled on first use, by a C compiler."""
    try:
        driver.active.get_current_target()
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton's driver can't be started, which needs a C compiler and libcuda: {said[0]}"
    return None


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """A context in which Triton launches where the tensor is: it takes the current device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


# What kernels are meant for while tensors lie on no GPU. In the interpreter it is Hopper, as its
# kernels have the most forms.
capability_without_device = contextvars.ContextVar("capability_without_device", default=90)


def capability(tensor: torch.Tensor) -> int:
    """The compute capability that a tensor's kernels are meant for: 90 is sm_90."""
    return _of_device(tensor.device.index) if tensor.is_cuda else capability_without_device.get()


@functools.lru_cache(None)
def _of_device(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@triton.jit
def to_float(value):
    """A value as float32. A bfloat16 is the upper half of its float: written so, the upper one of a
    register's pair takes one instruction, where the compiler's own conversion takes two."""
    if value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """A float32 value rounded to the nearest of `dtype`, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def reciprocal(value):
    """1 / value to 1 ulp, for values of ordinary size. A division would scale huge divisors first,
    four instructions more."""
    if _INTERPRETED:
        return 1.0 / value
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def row_keep(seed, row, group, site, threshold, GROUP: tl.constexpr):
    """dropout.row_keep_mask of rows and groups of GROUP columns, numbers or tensors that broadcast
    to one shape: GROUP booleans for each, in further dimensions behind, for the caller to reshape.

    GROUP is the number of neighbouring columns that one thread holds: 8 (a whole Philox call) for
    16-bit data, 4 for float32, where two threads draw the same call and use half each. So the draws
    are where the data is and nothing moves between threads.
    """
    group = group.to(tl.uint32)
    call = group if GROUP == 8 else group // 2
    row = row.to(tl.int64)
    zero = tl.zeros_like(call)
    w0, w1, w2, w3 = tl.philox(
        seed,
        call,
        zero + row.to(tl.uint32),
        zero + (row >> 32).to(tl.uint32),
        zero + site.to(tl.uint32),
        n_rounds=7,
    )
    # The joins put word 0's low half first, then its high half, then word 1's, ...
    if GROUP == 8:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    else:
        upper = group % 2 == 1
        words = tl.join(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    draws = tl.join(words & 0xFFFF, words >> 16)
    return draws.to(tl.int32) >= threshold
