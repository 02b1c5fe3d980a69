"""y = act(u) * v, u and v the halves of x + bias, in torch. Autograd does the rest.

Runs in float32 for 16-bit inputs and rounds once, at the output; float64 stays float64, which makes
it the oracle of every test. On a CPU it is also what `backend="auto"` runs.
"""

import torch
import torch.nn.functional as F


def act(u: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(u)
    return F.gelu(u, approximate="tanh" if activation == "gelu_tanh" else "none")


def forward(
    x: torch.Tensor, bias: torch.Tensor | None, activation: str, second: bool
) -> torch.Tensor:
    """second: whether the activated half is the second one."""
    compute = x.dtype if x.dtype == torch.float64 else torch.float32
    wide = x.to(compute)
    if bias is not None:
        wide = wide + bias.to(compute)
    u, v = wide.chunk(2, -1)
    if second:
        u, v = v, u
    return (act(u, activation) * v).to(x.dtype)
