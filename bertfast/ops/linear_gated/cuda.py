"""linear_gated by csrc/kernels/linear_gated.cu, on a GPU or compiled for the host."""

from typing import Any

import torch

from .. import native
from ..gated.limits import ACTIVATIONS
from . import limits


def unsupported_reason(device: str | torch.device, *case: Any) -> str | None:
    """case: as in limits.py."""
    return native.unsupported_reason(device) or limits.unsupported_reason(*case)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    y: torch.Tensor,
    u: torch.Tensor | None,
) -> None:
    """Fills y, and u if it is given."""
    number = ACTIVATIONS.index(activation)
    native.module_for(x).linear_gated_forward(x, weight, bias, number, y, u)


def backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    du: torch.Tensor,
    dbias: torch.Tensor | None,
) -> None:
    """Fills du, and dbias if it is given."""
    module = native.module_for(dy)
    partial = None
    if dbias is not None:
        partial = dy.new_empty(module.linear_gated_partial_shape(u), dtype=torch.float32)
    number = ACTIVATIONS.index(activation)
    module.linear_gated_backward(dy, weight, u, bias, number, du, dbias, partial)
