"""layer_norm by csrc/kernels/layer_norm.cu, on a GPU or compiled for the host."""

import torch

from .. import native
from ..dropout import Dropout
from . import limits
from .run import Gradients, Norm, Outputs


def unsupported_reason(
    device: str | torch.device, dtype: torch.dtype | None = None, width: int | None = None
) -> str | None:
    return native.unsupported_reason(device) or limits.unsupported_reason(dtype, width)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    norm: Norm,
    dropout: Dropout,
    outs: Outputs,
) -> None:
    """Fills the outputs that are there. x and residual are rows."""
    native.module_for(x).layer_norm_forward(x, residual, x_bias, norm, dropout, outs)


def backward(
    dy: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout: Dropout,
    grads: Gradients,
) -> None:
    """Fills the gradients that are there. dy and z are rows."""
    module = native.module_for(dy)
    shape = module.layer_norm_partial_shape(dy, grads)
    partial = mean.new_empty(shape)
    module.layer_norm_backward(dy, z, mean, rstd, weight, dropout, grads, partial)
