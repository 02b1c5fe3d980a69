"""y = act(g) * v, g and v the halves of u + bias, u = x weight^T; with dh = dy weight the halves of
du are dh * v * act'(g) and dh * act(g), dbias = sums of du.

Saved for the backward: u, the product rounded to its dtype, without its bias; y is that of the
rounded u. x (M, K), weight (2 N, K), y (M, N), u (M, 2 N); in the backward dy (M, K), weight
(K, N), u and du (M, 2 N). Any K and N that are multiples of 8.

The kernels, and how work is split, are those of a product with a GELU (linear/triton.py): a tile of
the forward has the same columns of both halves, BLOCK_N of each, side by side in its sums, so that
a thread has gate and value of the same place. Tiles: linear/config.py, passes "gated ...".

Moves, in values: in the forward M K + 2 N K + M N, and 2 M N more for u; in the backward M K + N K
+ 4 M N. A product and a kernel after it move 4 M N more (u written and read), in a forward that
saves u 2 M N more, in the backward 2 M N.
"""

from typing import Any

import torch

from .. import triton_lib
from ..linear import triton as linear
from . import limits


def unsupported_reason(device: str | torch.device, *case: Any) -> str | None:
    """case: as in limits.py."""
    return triton_lib.unsupported_reason(device) or limits.unsupported_reason(*case)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    y: torch.Tensor,
    u: torch.Tensor | None,
) -> None:
    """Fills y, and u if it is given."""
    linear.activate(x, weight, bias, linear.Activation(activation, 2), y, u)


def backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    du: torch.Tensor,
    dbias: torch.Tensor | None,
) -> None:
    """Fills du, and dbias if it is given."""
    linear.derive(dy, weight, u, bias, linear.Activation(activation, 2), du, dbias)
