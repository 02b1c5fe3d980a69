"""A product and the GELU that follows it, forward and backward, in one kernel or in two.

    u = x weight^T,  y = gelu(u + bias)            dv = (dy weight) * gelu'(u + bias)

Both forms round u, save it without its bias, and give the same numbers but for the order in which a
product is summed. `Choice` says who does what; backend modules have

    forward(x, weight, bias, tanh, y, u)                       fills y, and u if it is given
    backward(dy, weight, u, bias, tanh, dv, dbias)             fills dv, and dbias if it is given

dy is the gradient of the product that takes y, weight the one of that product: (its outputs, width
of y). What they are given is dense, or rows apart by a multiple of 16 bytes, and aligned to 16.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import dispatch, tuned
from ..bias_gelu import run as bias_gelu
from ..registration import empty
from ..rows import aligned_rows
from . import limits


class Choice(NamedTuple):
    """The backends of a product and its activation."""

    after: str  # of the activation's op, after a product of cuBLAS
    forward: str | None = None  # of the kernel that does both; None: there are two
    backward: str | None = None


class Ops(NamedTuple):
    """An activation's op, and the one that makes the product too."""

    after: str
    both: str
    limits: Callable[..., str | None]  # of the latter: why it can't have a call's sizes


GELU = Ops("bias_gelu", "linear_gelu", limits.unsupported_reason)


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int | None],
    product: tuple[int, int] | None = None,
    ops: Ops = GELU,
) -> Choice:
    """sizes: inputs, outputs and rows (None where they can't be known) of the forward's product.
    product: inputs and outputs of the backward's, if there is to be one.

    Who makes a product is a matter of speed alone, and nothing but a measurement decides it; an
    explicit backend has its say which kernels may do it.
    """
    inputs, outputs, rows = sizes
    most = None if rows is None else limits.rows_class(rows)
    key = (ops, backend, device, dtype, inputs, outputs, most, product)
    found = _choices.get(key)
    if found is None:
        found = _choices[key] = _choose(*key)
    return found


_choices: dict[tuple, Choice] = {}
tuned.depending.append(_choices.clear)


def _choose(
    ops: Ops,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    inputs: int,
    outputs: int,
    rows: int | None,
    product: tuple[int, int] | None,
) -> Choice:
    after = dispatch.choose(ops.after, backend, device, dtype)
    if after == "torch" or rows is None:
        return Choice(after)

    def measured(*case: Any) -> str | None:
        chosen = dispatch.choose(ops.both, "auto", device, dtype, *case)
        allowed = chosen != "torch" and backend in ("auto", chosen)
        return chosen if allowed else None

    forward = measured(inputs, outputs, rows)
    return Choice(after, forward, measured(*product, rows, "backward") if product else None)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    choice: Choice,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and, to be saved, u. x is (rows, inputs)."""
    if choice.forward is None:
        made = torch.mm(x, weight.t())
        return bias_gelu.forward(made, bias, tanh, choice.after), made if save else None
    return forward_in_one(GELU, x, weight, bias, tanh, choice.forward, (weight.shape[0], save))


def forward_in_one(
    ops: Ops,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    form: Any,
    backend: str,
    outputs: tuple[int, bool],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and, to be saved, u, by one kernel. form: of the activation. outputs: the width of y, and
    whether u is one."""
    width, save = outputs
    options: Any = dict(dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape[0], width, **options)
    u = torch.empty(x.shape[0], weight.shape[0], **options) if save else None
    if y.numel():
        bias = None if bias is None else aligned_rows(bias)
        module = dispatch.backend_module(ops.both, backend)
        module.forward(aligned_rows(x), aligned_rows(weight), bias, form, y, u)
    return y, u


def backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    wanted: tuple[bool, bool],
    choice: Choice,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dv and dbias, where they are wanted."""
    if choice.backward is None:
        dh = dy @ weight
        return bias_gelu.backward(dh, u, bias, tanh, *wanted, choice.after, in_place=True)
    return backward_in_one(GELU, dy, weight, u, bias, tanh, wanted[1], choice.backward)


def backward_in_one(
    ops: Ops,
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    form: Any,
    want_dbias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """u's gradient and, where it is wanted, the bias's, by one kernel."""
    du = empty(u)
    dbias = empty(bias) if bias is not None and want_dbias else None
    if du.numel():
        bias = None if bias is None else aligned_rows(bias)
        module = dispatch.backend_module(ops.both, backend)
        u = aligned_rows(u.contiguous())  # a hook on saved tensors may have moved it
        module.backward(aligned_rows(dy), aligned_rows(weight), u, bias, form, du, dbias)
    elif dbias is not None:
        dbias.zero_()
    return du, dbias
