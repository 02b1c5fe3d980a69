"""linear_gelu by csrc/kernels/linear_gelu, on a GPU or compiled for the host."""

from typing import Any

import torch

from .. import native
from . import limits


def unsupported_reason(device: str | torch.device, *case: Any) -> str | None:
    """case: as in limits.py."""
    return native.unsupported_reason(device) or limits.unsupported_reason(*case)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    y: torch.Tensor,
    u: torch.Tensor | None,
) -> None:
    """Fills y, and u where it is given."""
    native.module_for(x).linear_gelu_forward(x, weight, bias, tanh, y, u)


def backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    dv: torch.Tensor,
    dbias: torch.Tensor | None,
) -> None:
    """Fills dv, and dbias where it is given."""
    module = native.module_for(dy)
    partial = None
    if dbias is not None:
        partial = dy.new_empty(module.linear_gelu_partial_shape(u), dtype=torch.float32)
    module.linear_gelu_backward(dy, weight, u, bias, tanh, dv, dbias, partial)
