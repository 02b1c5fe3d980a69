"""Losses of a chunk's rows and the gradients of their logits, composed of torch's functions, in the
place of the logits. triton.py says what they are."""

import torch


def forward(
    z: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    smoothing: float,
    losses: torch.Tensor,
    scale: torch.Tensor | None,
    dz: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """Fills losses and dz, which may be z, and adds to dbias. z is written to."""
    vocabulary = z.shape[1]
    counted = labels >= 0
    label = labels.clamp(min=0)[:, None]
    if bias is not None:
        z += bias

    # 1. the losses; logits and their exponentials relative to the row's largest
    z -= z.amax(1, keepdim=True)
    own = z.gather(1, label).squeeze(1)
    loss = -own
    if smoothing:
        loss += smoothing * (own - z.mean(1))
    total = z.exp_().sum(1)
    losses.copy_(torch.where(counted, loss.add_(total.log()), 0.0))
    if dz is None:
        return

    # 2. dz
    row = torch.where(counted, 1.0 if scale is None else scale, 0.0).to(z.dtype)
    z *= (row / total)[:, None]
    if smoothing:
        z -= (row * (smoothing / vocabulary))[:, None]
    z.scatter_add_(1, label, (row * (smoothing - 1))[:, None])
    if dbias is not None:
        dbias += z.sum(0)
    if dz is not z:
        dz.copy_(z)
