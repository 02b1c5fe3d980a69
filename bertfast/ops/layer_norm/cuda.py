"""layer_norm by csrc/kernels/layer_norm.cu, on a GPU or compiled for the host."""

import torch

from .. import native
from ..dropout import Dropout
from . import limits
from .run import Gradients, Norm, Outputs, Saved


def unsupported_reason(
    device: str | torch.device, dtype: torch.dtype | None = None, width: int | None = None
) -> str | None:
    return native.unsupported_reason(device) or limits.unsupported_reason(dtype, width)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    norm: Norm | None,
    dropout: Dropout,
    outs: Outputs,
) -> None:
    """Fills the outputs that are there. x and residual are rows."""
    native.module_for(x).layer_norm_forward(x, residual, x_bias, norm, dropout, outs)


def backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    saved: Saved,
    weight: torch.Tensor | None,
    dropout: Dropout,
    grads: Gradients,
) -> None:
    """Fills the gradients that are there. dy, dsum and z are rows."""
    module = native.module_for(dy)
    shape = module.layer_norm_partial_shape(dy, grads)
    partial = torch.empty(shape, dtype=torch.float32, device=dy.device)
    module.layer_norm_backward(dy, dsum, saved, weight, dropout, grads, partial)
