"""y = LayerNorm(dropout(x + x_bias) + residual) * weight + bias, in torch. Autograd does the rest.

Runs in float32 for 16-bit inputs and rounds once, at the output; float64 stays float64, which makes
it the oracle of every test. On a CPU it is also what `backend="auto"` runs.
"""

import math

import torch
import torch.nn.functional as F

from .. import dropout


def forward(x, weight, bias, residual, x_bias, seed, row_index, eps, threshold, site):
    dtype = weight.dtype
    compute = dtype if dtype == torch.float64 else torch.float32
    z = x.to(compute)
    if x_bias is not None:
        z = z + x_bias.to(compute)
    if threshold:
        rows, width = math.prod(x.shape[:-1]), x.shape[-1]
        row = torch.arange(rows, device=x.device) if row_index is None else row_index
        keep = dropout.row_keep_mask(seed, site, row, width, threshold).view(x.shape)
        # where, not a product: what is dropped may be Inf or NaN and must not survive.
        z = torch.where(keep, z * dropout.keep_scale(threshold), 0.0)
    if residual is not None:
        z = z + residual.to(compute)
    y = F.layer_norm(z, z.shape[-1:], weight.to(compute), bias.to(compute), eps)
    return y.to(dtype)
