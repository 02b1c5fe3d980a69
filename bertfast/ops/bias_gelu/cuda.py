"""bias_gelu by csrc/kernels/bias_gelu.cu, on a GPU or compiled for the host."""

import torch

from .. import native
from . import limits


def unsupported_reason(device: str | torch.device, dtype: torch.dtype | None = None) -> str | None:
    return native.unsupported_reason(device) or limits.unsupported_reason(dtype)


def forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool, y: torch.Tensor) -> None:
    """Fills y. x is rows."""
    native.module_for(x).bias_gelu_forward(x, bias, tanh, y)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    dx: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """Fills dx and dbias where they are given. dy and x are rows."""
    module = native.module_for(dy)
    if dx is None:  # the kernel writes it anyway
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = None
    if dbias is not None:
        shape = module.bias_gelu_partial_shape(dy)
        partial = dy.new_empty(shape, dtype=torch.float32)
    module.bias_gelu_backward(dy, x, bias, tanh, dx, dbias, partial)
