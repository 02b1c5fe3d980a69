"""y = act(g) * v, g and v the halves of x weight^T + bias, in torch. Autograd does the rest.

Runs in float32 for 16-bit inputs and rounds once, at the output; float64 stays float64, which makes
it the oracle of every test.
"""

import torch
import torch.nn.functional as F

from ..gated import reference as gated


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    both = F.linear(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute))
    return gated.forward(both, None, activation, False).to(x.dtype)
