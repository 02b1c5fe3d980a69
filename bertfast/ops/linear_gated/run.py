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

from .. import dispatch
from ..gated import run as gated
from ..linear import run as linear
from ..linear.run import Choice
from ..registration import empty
from ..rows import aligned_rows

OPS = linear.Ops("gated", "linear_gated")


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
    rows, wide = x.shape[0], weight.shape[0]
    y = torch.empty(rows, wide // 2, dtype=x.dtype, device=x.device)
    u = torch.empty(rows, wide, dtype=x.dtype, device=x.device) if save else None
    if y.numel():
        bias = None if bias is None else aligned_rows(bias)
        module = dispatch.backend_module("linear_gated", choice.forward)
        module.forward(aligned_rows(x), aligned_rows(weight), bias, activation, y, u)
    return y, u


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
    du = empty(u)
    dbias = empty(bias) if bias is not None and want_dbias else None
    if du.numel():
        bias = None if bias is None else aligned_rows(bias)
        module = dispatch.backend_module("linear_gated", choice.backward)
        u = aligned_rows(u.contiguous())  # a hook on saved tensors may have moved it
        module.backward(aligned_rows(dy), aligned_rows(weight), u, bias, activation, du, dbias)
    elif dbias is not None:
        dbias.zero_()
    return du, dbias
