"""gated by csrc/kernels/gated.cu, on a GPU or compiled for the host."""

import torch

from .. import native
from . import limits


def unsupported_reason(device: str | torch.device, dtype: torch.dtype | None = None) -> str | None:
    return native.unsupported_reason(device) or limits.unsupported_reason(dtype)


def forward(
    x: torch.Tensor, bias: torch.Tensor | None, activation: str, second: bool, y: torch.Tensor
) -> None:
    """Fills y. x is rows."""
    number = limits.ACTIVATIONS.index(activation)
    native.module_for(x).gated_forward(x, bias, number, second, y)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    second: bool,
    dx: torch.Tensor,
    dbias: torch.Tensor | None,
) -> None:
    """Fills dx, and dbias where it is given. dy and x are rows."""
    module = native.module_for(dy)
    partial = None
    if dbias is not None:
        partial = dy.new_empty(module.gated_partial_shape(dy), dtype=torch.float32)
    number = limits.ACTIVATIONS.index(activation)
    module.gated_backward(dy, x, bias, number, second, dx, dbias, partial)
