"""A Linear on a CPU with what follows it fused, by oneDNN: bias, GELU, residual.

torch has these products for its compiler's use. They are not public, so they are looked for and
tried against F.linear once a process. They are used where they were measured to win, by the
processor alone, so that every process, thread and call has the same bits. oneDNN's order of
sums differs from F.linear's; a layer in eval is served with and without gradients, one in training
never.
"""

import functools
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import tracing
from ..derivatives import Context

VARIABLE = "BERTFAST_ONEDNN"
# Of torch.backends.cpu.get_cpu_capability(): as fast as F.linear or faster. With AVX2 they gain
# nothing; others were not measured.
WINS = ("AVX512",)
# With fewer rows than the first it is slower than F.linear, with one row half as fast; up to the
# second it is so where a width is below the third (an Intel Xeon with AVX-512, one thread).
LEAST_ROWS, FEW_ROWS, WIDE = 8, 128, 768


class LeastWork(NamedTuple):
    """Multiply-adds: in a smaller product what oneDNN does once a call is more than it saves. It
    saves a pass over the outputs by a GELU, and some of one by a residual."""

    linear: float
    gelu: float


# One thread, widths of 64 to 3072; the first on an Intel Xeon, the second on an AMD EPYC. F.linear
# is MKL's, which on its maker's processors is as fast: from 2^25 on, 0.86 to 1.11 times oneDNN's
# time, and with a residual added after it 0.90 to 1.15 times.
ON_INTEL, ELSEWHERE = LeastWork(math.inf, 2**23), LeastWork(2**23, 2**21)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _call(x, weight, bias, None, None)


def linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, approximate: str
) -> torch.Tensor:
    return _call(x, weight, bias, None, approximate)


def linear_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """linear(x) + residual"""
    return _call(x, weight, bias, residual, None)


def serves(
    x: torch.Tensor, weight: torch.Tensor, training: bool, approximate: str | None = None
) -> bool:
    """True if these functions are to be used for x now. training: the flag of the layer."""
    if not may_serve(x, training):  # before `pays`, whose look at the processor Dynamo can't trace
        return False
    return pays(x.numel() // max(1, weight.shape[1]), weight, approximate is not None)


def may_serve(x: torch.Tensor, training: bool) -> bool:
    """The same, where the product is large enough."""
    return (
        not training
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and tracing.plain_call(x)
        and not tracing.only_reference()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and why_not() is None
    )


def pays(rows: int, weight: torch.Tensor, gelu: bool = False) -> bool:
    """True if a product of so many rows is large enough for these functions."""
    least = _least_work()[gelu]
    if least == math.inf:
        return False
    outputs, inputs = weight.shape
    if rows >= FEW_ROWS and rows * inputs * outputs >= least:
        return True
    return least == 0 or (rows >= LEAST_ROWS and min(inputs, outputs) >= WIDE)


@functools.cache
def _least_work() -> LeastWork:
    if os.environ.get(VARIABLE) not in (None, "", "0"):
        return LeastWork(0, 0)
    return ON_INTEL if _is_intel() else ELSEWHERE


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def forget() -> None:
    """Has the setting read again."""
    _least_work.cache_clear()
    why_not.cache_clear()


@functools.cache
def why_not() -> str | None:
    """Why this process doesn't use them; None if it does."""
    setting = os.environ.get(VARIABLE, "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0, 1 or unset, got {setting!r}")
    if setting == "0":
        return f"{VARIABLE} is 0"
    if not _are_right():
        if setting == "1":
            raise ValueError(
                f"{VARIABLE} is 1, but this torch doesn't have oneDNN's fused products"
            )
        return "this torch doesn't have them"
    capability = torch.backends.cpu.get_cpu_capability()
    if setting != "1" and capability not in WINS:
        return f"they gain nothing, or weren't measured, with {capability}"
    return None


def _call(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, approximate: str | None
) -> Tensor:
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias, residual, approximate)
    return _product(x, weight, bias, residual, approximate)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, approximate: str | None
) -> Tensor:
    op = torch.ops.mkldnn._linear_pointwise
    if residual is not None:
        return op.binary(x, residual, weight, bias, "add")
    if approximate is not None:
        return op(x, weight, bias, "gelu", [], approximate)
    return op(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """The derivatives are those of torch's own ops, which have further ones.

    With a GELU the backward makes z = x @ weight^T + bias once more, by F.linear. That z differs
    from oneDNN's by rounding, as any two orders of its sum do, and GELU'(z), whose slope is at most
    0.8, differs by no more: the gradient is that of the exact function at the same x, weight and
    bias, up to rounding, not that of a function which is a little different.
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        approximate: str | None,
    ) -> Tensor:
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if approximate is not None:
            ctx.save_for_backward(x, weight, bias)
        else:
            ctx.save_for_backward(x if need_weight else None, weight if need_x else None, None)
        ctx.approximate = approximate
        return _product(x, weight, bias, residual, approximate)

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        dz = dy
        if ctx.approximate is not None:
            z = F.linear(x, weight, bias)
            dz = torch.ops.aten.gelu_backward(dy, z, approximate=ctx.approximate)
        need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
        rows = dz.reshape(-1, dz.shape[-1])  # which batched gradients can, unlike flatten
        return (
            dz @ weight if need_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            rows.sum(0) if need_bias else None,
            dy if need_residual else None,
            None,
        )


def _are_right() -> bool:
    """True if they exist and give the expected numbers."""
    if not torch.backends.mkldnn.is_available():
        return False
    like: dict[str, Any] = dict(
        generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    x, weight, residual = (
        torch.randn(shape, **like) for shape in ((64, 256), (128, 256), (64, 128))
    )
    bias = torch.randn(128, **like)
    z = F.linear(x, weight, bias)
    try:
        pairs = (
            (_product(x, weight, bias, None, None), z),
            (_product(x, weight, bias, residual, None), z + residual),
            (_product(x, weight, bias, None, "none"), F.gelu(z)),
            (_product(x, weight, bias, None, "tanh"), F.gelu(z, approximate="tanh")),
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    # 256 products of standard normal values, summed in another order.
    bound = 2 * 256**0.5 * 2**-24 * 256
    return all((a - b).abs().max().item() <= bound for a, b in pairs)
