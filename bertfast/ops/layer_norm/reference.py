"""y = LayerNorm(dropout(x + x_bias) + residual) * weight + bias, or RMSNorm, and the sum that is
normalised, in torch. Autograd does the rest.

Runs in float32 for 16-bit inputs and rounds once, at the output; float64 stays float64, which makes
it the oracle of every test. On a CPU it is also what `backend="auto"` runs.
"""

import math

import torch
import torch.nn.functional as F

from ..dropout import Dropout, row_keep_mask
from .run import Norm


def forward(
    x: torch.Tensor,
    norm: Norm,
    x_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dropout: Dropout,
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias, eps, rms = norm
    dtype = weight.dtype
    compute = dtype if dtype == torch.float64 else torch.float32
    z = x.to(compute)
    if x_bias is not None:
        z = z + x_bias.to(compute)
    if not dropout.threshold:
        pass
    elif dropout.seed is None:
        z = F.dropout(z, dropout.threshold / 65536)
    else:
        rows, width = math.prod(x.shape[:-1]), x.shape[-1]
        row = torch.arange(rows, device=x.device) if dropout.rows is None else dropout.rows
        keep = row_keep_mask(dropout.seed, dropout.site, row, width, dropout.threshold)
        # where, not a product: what is dropped may be Inf or NaN and must not survive.
        z = torch.where(keep.view(x.shape), z * dropout.scale, 0.0)
    if residual is not None:
        z = z + residual.to(compute)
    if rms:
        y = F.rms_norm(z, z.shape[-1:], weight.to(compute), eps)
    else:
        bias = None if bias is None else bias.to(compute)
        y = F.layer_norm(z, z.shape[-1:], weight.to(compute), bias, eps)
    return y.to(dtype), z.to(dtype)
