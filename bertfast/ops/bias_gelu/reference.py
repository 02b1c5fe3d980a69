"""y = gelu(x + bias), in torch. Autograd does the rest.

Runs in float32 for 16-bit inputs and rounds once, at the output; float64 stays float64, which makes
it the oracle of every test. On a CPU it is also what `backend="auto"` runs.
"""

import torch
import torch.nn.functional as F


def forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    dtype = x.dtype if bias is None else bias.dtype
    compute = dtype if dtype == torch.float64 else torch.float32
    v = x.to(compute)
    if bias is not None:
        v = v + bias.to(compute)
    return F.gelu(v, approximate="tanh" if tanh else "none").to(dtype)
