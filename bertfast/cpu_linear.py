"""A Linear on a CPU with what follows it fused, by oneDNN: bias, exact GELU, residual.

torch has these products for its compiler's use; they are not public, so they are looked for, tried
against F.linear for value and time once a process, and left alone where they don't win. They have
no gradient.
"""

import functools
import time

import torch
import torch.nn.functional as F

from .ops import dispatch


def linear(x, weight, bias):
    return _op()(x, weight, bias, "none", [], "")


def linear_gelu(x, weight, bias, approximate: str):
    return _op()(x, weight, bias, "gelu", [], approximate)


def linear_add(x, residual, weight, bias):
    """linear(x) + residual"""
    return _op().binary(x, residual, weight, bias, "add")


def serves(x: torch.Tensor) -> bool:
    """Whether these functions may and should be used for x now."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.numel() > 0
        and dispatch.plain_call(x)
        and not dispatch.only_reference()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and _wins()
    )


def _op():
    return torch.ops.mkldnn._linear_pointwise


@functools.lru_cache(None)
def _wins() -> bool:
    """Whether they exist, are right, and a feed-forward product with its GELU is faster by them."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 256, generator=generator) for n in (256, 1024))
    bias = torch.randn(1024, generator=generator)
    residual = torch.randn(256, 1024, generator=generator)

    def theirs():
        return F.gelu(F.linear(x, weight, bias))

    def ours():
        return linear_gelu(x, weight, bias, "none")

    try:
        pairs = (
            (ours(), theirs()),
            (linear(x, weight, bias), F.linear(x, weight, bias)),
            (linear_add(x, residual, weight, bias), F.linear(x, weight, bias) + residual),
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    # 256 products of standard normal values, summed in another order.
    bound = 2 * 256**0.5 * 2**-24 * 256
    if any((a - b).abs().max().item() > bound for a, b in pairs):
        return False
    return _fastest(ours) < 1.02 * _fastest(theirs)


def _fastest(function, times: int = 5) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
