"""A product and the gated activation that follows it, forward and backward, in one kernel or two.

    u = x weight^T,  y = act(g) * v, g and v the halves of u + bias
    dh = dy weight,  du = [dh * v * act'(g), dh * act(g)]

As in linear/run.py, whose `Choice` says who does what: u is rounded and saved without its bias, by
both forms, whose numbers differ only by the order in which a product is summed. Backend modules
have

    forward(x, weight, bias, activation, y, u)                 fills y, and u if it is given
    backward(dy, weight, u, bias, activation, du, dbias)       fills du, and dbias if it is given

dy is the gradient of the product that takes y, weight the one of that product: (its outputs, width
of y). u and du have twice the width of y.
"""

import torch

from ..gated import run as gated
from ..linear import run as linear
from ..linear.run import Choice
from . import limits

OPS = linear.Ops("gated", "linear_gated", limits.unsupported_reason)


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int | None],
    product: tuple[int, int] | None = None,
) -> Choice:
    """sizes: inputs, width of y, and rows, as in linear/run.py."""
    return linear.choose(backend, device, dtype, sizes, product, OPS)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    choice: Choice,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and, to be saved, u. x is (rows, inputs)."""
    if choice.forward is None:
        made = torch.mm(x, weight.t())
        y = gated.forward(made, bias, activation, False, choice.after)
        return y, made if save else None
    outputs = weight.shape[0] // 2, save
    return linear.forward_in_one(OPS, x, weight, bias, activation, choice.forward, outputs)


def backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    want_dbias: bool,
    choice: Choice,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """du and, where it is wanted, dbias."""
    if choice.backward is None:
        return gated.backward(dy @ weight, u, bias, activation, False, want_dbias, choice.after)
    given = dy, weight, u, bias, activation, want_dbias, choice.backward
    return linear.backward_in_one(OPS, *given)
