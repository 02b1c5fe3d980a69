"""q, k and v of a layer in one product, or gate and up of a gated MLP.

The weights lie in one allocation, one after the other, but each is a tensor with a storage of
its own, so that a model saved by its storages is complete. Many things move a weight elsewhere
(`.to`, deepcopy, `.data =`, sharding); in eager the addresses are compared on every call, which
takes a few microseconds, and the weights gathered again when they differ.

Weights whose memory others may free or fill behind their Parameter are left where they are: they
are then concatenated for each product, as they are while something is traced.
"""

import contextlib
import threading
import weakref
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

from .. import tracing
from ..ops.derivatives import Context

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]

_gathering = threading.Lock()


class JoinedWeights:
    """The allocation of one layer's weights. A copy of the layer, or one from a pickle, starts
    without, as its parameters lie elsewhere."""

    def __init__(self, linears: tuple[nn.Module | None, ...] = ()) -> None:
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.stays = False  # another process may have the same weights
        plain = [linear for linear in linears if type(linear) is nn.Linear]
        self._own = [weakref.ref(p) for linear in plain for p in linear.parameters()]

    def __deepcopy__(self, memo: dict) -> "JoinedWeights":
        return JoinedWeights()

    def __reduce__(self) -> tuple:
        return JoinedWeights, ()

    def holds(self, weights: Tensors, biases: Tensors | None) -> bool:
        """True if the parameters are those in the allocation."""
        if not _lie_in(self.weight, weights):
            return False
        if biases is None:
            return self.bias is None
        return _lie_in(self.bias, biases)

    def gather(self, weights: Tensors, biases: Tensors | None) -> bool:
        """Moves the parameters into one allocation, their values as they are; False if they have
        to stay where they are."""
        parameters = [*weights, *(biases or ())]
        if not self._may_move(parameters):
            return False
        with _gathering, torch.inference_mode(False), torch.no_grad():
            if not self.holds(weights, biases):  # another thread may have been here
                joined = _join(weights)
                self.bias = None if biases is None else _join(biases)
                self.weight = joined
        return True

    def of(
        self, weights: tuple[torch.Tensor, ...], biases: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of one product for all, in the allocation if that is allowed. Without a
        history. A single weight is itself."""
        if len(weights) == 1:
            return weights[0], biases[0] if biases else None
        if self.holds(weights, biases or None) or (
            not tracing.is_capturing(weights[0])  # a graph must not move weights
            and self.gather(weights, biases or None)
        ):
            joined: Any = self.weight
            return joined, self.bias
        with torch.no_grad():
            return torch.cat(weights), torch.cat(biases) if biases else None

    def weight_of(self, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The weights one after the other, for a backward, which moves nothing."""
        if len(weights) == 1:
            return weights[0]
        joined = self.weight
        return joined if joined is not None and _lie_in(joined, weights) else torch.cat(weights)

    def _may_move(self, parameters: Tensors) -> bool:
        # What other processes read or write must stay in the memory that they know.
        if self.stays or any(p.device.type == "cpu" and p.is_shared() for p in parameters):
            return False
        # Sharding keeps the storage of a gathered Parameter to itself and makes new Parameters; so
        # where there are processes to shard over, only those from before it may be moved.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            own = [ref() for ref in self._own]
            if not all(any(p is known for known in own) for p in parameters):
                return False
        return all(
            type(p) is nn.Parameter
            and p.is_leaf
            and not p.is_inference()
            and p.untyped_storage().nbytes() == p.nbytes  # no part of something else
            for p in parameters
        ) and len({p.data_ptr() for p in parameters}) == len(parameters)


def _for_another_process(joined: JoinedWeights) -> tuple:
    """How multiprocessing sends it: from then on two processes have the weights. Of a GPU's tensors
    nothing else tells."""
    joined.stays = True
    return _staying, ()


def _staying() -> JoinedWeights:
    joined = JoinedWeights()
    joined.stays = True
    return joined


ForkingPickler.register(JoinedWeights, _for_another_process)


def _lie_in(joined: torch.Tensor | None, parts: Tensors) -> bool:
    """True if the parts lie in `joined`, one after the other, and are all of it."""
    if joined is None or len(joined) != len(parts) * len(parts[0]):
        return False
    dtype, address, step = joined.dtype, joined.data_ptr(), joined.nbytes // len(parts)
    for part in parts:
        if part.data_ptr() != address or part.dtype != dtype or not part.is_contiguous():
            return False
        address += step
    return True


def _join(parameters: Tensors) -> torch.Tensor:
    """One tensor of all; each parameter then owns its part of the memory.

    On a GPU the host waits, as other threads may use the parameters on other streams: the new
    memory is filled before one of them can see it, and the old is kept until none reads it.
    """
    before = [parameter.detach() for parameter in parameters]
    joined = torch.cat(before)
    with _current(joined):
        _wait_for(joined)
        for parameter, part in zip(parameters, joined.chunk(len(before)), strict=True):
            parameter.data = torch.from_dlpack(part)
        _wait_for(joined)
    return joined


def _current(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one: torch exports no memory of another."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _wait_for(tensor: torch.Tensor) -> None:
    """Waits for all that the tensor's device was given to do."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def same_form(linears: Sequence[Any]) -> bool:
    """True if one product can serve all of these: one shape, dtype and place, biases for all or
    none."""
    first, *others = (linear.weight for linear in linears)
    shape, dtype, device = first.shape, first.dtype, first.device
    some = [linear.bias.dtype for linear in linears if linear.bias is not None]
    return (
        len(some) in (0, len(linears))
        and all(one == dtype for one in some)
        and all(w.shape == shape and w.dtype == dtype and w.device == device for w in others)
    )


def joined_product(linears: Sequence[Any], x: torch.Tensor, joined: JoinedWeights) -> torch.Tensor:
    """[q(x), k(x), v(x)] in one tensor (..., 3 * width) of plain Linears of the same form."""
    weights = tuple(linear.weight for linear in linears)
    biases = None if linears[0].bias is None else tuple(linear.bias for linear in linears)
    if not tracing.plain_call(x, *weights) or tracing.only_reference():
        return _concatenated(x, weights, biases)
    if not joined.holds(weights, biases):
        if tracing.is_capturing(x):
            return _concatenated(x, weights, biases)  # the graph must not move weights
        if not joined.gather(weights, biases):
            return _concatenated(x, weights, biases)
    cast = tracing.autocast(x)
    if cast is not None:
        x = x.to(cast)
    parameters = (*weights, *(biases or ()))
    return _JoinedProduct.apply(x, joined.weight, joined.bias, len(weights), *parameters)


def _concatenated(x: torch.Tensor, weights: Tensors, biases: Tensors | None) -> torch.Tensor:
    return F.linear(x, torch.cat(weights), None if biases is None else torch.cat(biases))


class _JoinedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        count: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.dtype, ctx.count = weight.dtype, count
        if tracing.autocast(x) is not None:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        # The parameters are saved too: torch then notices one that changed before the backward,
        # which it can't by the joined weights, as each of all these counts its own changes.
        ctx.save_for_backward(x, weight, *parameters)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Context, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, *parameters = ctx.saved_tensors
        dx = dweights = dbiases = None
        count = ctx.count
        if torch.is_grad_enabled():  # a second derivative leads to the parameters themselves
            weight = torch.cat(parameters[:count]).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
        rows = dy.reshape(-1, dy.shape[-1])  # which batched gradients can, unlike flatten
        wanted = ctx.needs_input_grad[4:]
        if any(wanted[:count]):
            dweights = (rows.t() @ x.reshape(-1, x.shape[-1])).to(ctx.dtype).chunk(count)
        if any(wanted[count:]):
            dbiases = rows.sum(0).to(ctx.dtype).chunk(count)
        grads = [*(dweights or (None,) * count), *(dbiases or (None,) * count)][: len(parameters)]
        return (
            *(dx, None, None, None),
            *(g if want else None for g, want in zip(grads, wanted, strict=True)),
        )
