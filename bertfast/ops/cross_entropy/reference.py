"""loss = cross_entropy(hidden weight^T + bias, labels), in torch, with all logits. Autograd does
the rest.

Runs in float32 for 16-bit inputs; float64 stays float64. It serves where something is traced.
"""

import torch
import torch.nn.functional as F


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> torch.Tensor:
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(compute)
    logits = F.linear(hidden.to(compute), weight.to(compute), bias)
    loss = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.view(labels.shape) if reduction == "none" else loss
