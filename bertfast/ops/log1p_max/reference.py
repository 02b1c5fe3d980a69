"""y = max over a sequence's tokens of log1p(relu(x weight^T + bias)), in torch, with all logits.
Autograd does the rest.

log1p and relu grow with the logit, so the largest logit of each sequence and word is enough. Runs
in float32 for 16-bit inputs; float64 stays float64. It serves where something is traced.
"""

import torch
import torch.nn.functional as F

from ...packing import Sequences


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sequences: Sequences
) -> torch.Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    kept = sequences.key_mask
    if sequences.cu_seqlens is not None:
        index, kept = places(sequences.cu_seqlens, sequences.max_seqlen)
        # One row behind the last, so that there is one to read where there are no tokens.
        x = torch.where(kept[..., None], F.pad(x, (0, 0, 0, 1))[index], 0)
    products = F.linear(x.to(compute), weight.to(compute))
    if kept is not None:
        products = products.masked_fill(~kept[..., None], -torch.inf)
    if not products.shape[1]:
        products = F.pad(products, (0, 0, 0, 1), value=-torch.inf)
    top = products.max(1).values  # whose gradient goes to the first of the largest
    if bias is not None:
        top = top + bias.to(compute)
    return torch.log1p(torch.relu(top)).to(x.dtype)


def places(cu_seqlens: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each sequence and position the number of its token, and whether there is one; else the
    number is 0."""
    position = torch.arange(longest, device=cu_seqlens.device)
    kept = position < (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]
    return torch.where(kept, cu_seqlens[:-1, None] + position, 0), kept
