"""A whole model's numbers beside the stock model's: outputs, and the gradient of every parameter.

    error <= 2 * (error of the stock model + u * scale)

for the largest error and for the root mean square. The oracle is the stock model in float64. The
yardstick is the stock model itself in the tested dtype, the worst of `WAYS` right ways to run it:
the batch at once, one row after another, and the batch with the terms of every matrix product, of
forward and backward, summed in a random order. Two more have softmax's backward as every fused
attention has it: dS = P (dP - sum(dO O)), where O is the context as it was rounded. An eager
model's own sum, sum(dP P) = sum(dO P V), has no such error, which all gradients of a row's scores
share. scale is |reference|.

Why so many: one run's error is one draw, and where few numbers are compared, or many that share one
rounding (the largest errors of a gradient come from one token), a second right draw may be any
multiple of it. For normal errors, the chance that a right model errs more than twice the worst of R
draws, E[F(|g| / 2)^R] with F the distribution of the yardstick's draws, is without `u * scale`

    independent errors in a tensor      R = 2       R = 10
                                  1      13 %       0.5 %
                                  2       7 %       0.09 %
                                  4       2.3 %     6e-5
                                  16      1e-4      < 1e-9

In return the yardstick is, on average, 1.9 standard deviations where there is one independent error
and 1.1 where there are a hundred.

What is compared is what both define: real tokens, not padding.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .budget import UNIT_ROUNDOFF, Finding

SEED = 1
# What two float32 runs of an encoder may differ by in a hidden state, which a LayerNorm has made
# about 1 in size. A layer rounds some 10 values on the way and inner / 16 partial sums of its
# longest product. For six layers with 1536 that is sqrt(6 * (10 + 96)) = 25 u, twice that as a
# product passes on the errors of both operands, sqrt(2) times that between two runs; the largest of
# 10^5 values is 4.4 standard deviations off: 313 u, rounded up.
HIDDEN_ATOL = 2e-5
WAYS = 10


def numbers(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    real: torch.Tensor | None,
    gradients: bool = True,
    by_row: bool = False,
) -> dict[str, torch.Tensor]:
    """Each output by its name, real tokens only, and each gradient as "d name", of the outputs'
    sum weighted by random numbers. real: bool (rows, length), or None if every token is real.

    by_row: each row through the model for itself.
    """
    rows, *_ = (len(tensor) for tensor in inputs.values())
    parts = [slice(n, n + 1) for n in range(rows)] if by_row else [slice(rows)]
    outputs: dict[str, list[torch.Tensor]] = {}
    model.zero_grad(set_to_none=True)
    weights: dict[str, torch.Tensor] = {}
    for part in parts:
        with torch.set_grad_enabled(gradients):
            result = model(**{name: value[part] for name, value in inputs.items()})
            loss: Any = 0.0  # of tensors, once an output was added
            for name, value in result.items():
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    continue
                if name not in weights:
                    generator = torch.Generator().manual_seed(SEED)
                    shape = (rows, *value.shape[1:])
                    weights[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
                weight = weights[name][part].to(value.device, value.dtype)
                if real is not None and value.shape[:2] == real[part].shape:
                    value, weight = value[real[part]], weight[real[part]]
                outputs.setdefault(name, []).append(value)
                loss = loss + (value * weight).sum()
        if gradients:
            loss.backward()
    found = {name: torch.cat(values).detach() for name, values in outputs.items()}
    if gradients:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found["d " + name] = parameter.grad
        model.zero_grad(set_to_none=True)
    return {name: value.cpu() for name, value in found.items()}


def beside_stock(
    stock: nn.Module,
    convert: Callable[[nn.Module], nn.Module],
    inputs: Mapping[str, torch.Tensor],
    real: torch.Tensor | None = None,
    gradients: bool = True,
) -> list[tuple[Finding, float]]:
    """A finding for each output and gradient of a converted copy of the model, and the stock
    model's own error."""
    exact_inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    exact = numbers(copy.deepcopy(stock).double(), exact_inputs, real, gradients)
    converted = numbers(convert(copy.deepcopy(stock)), inputs, real, gradients)
    if converted.keys() != exact.keys():
        raise ValueError(f"expected {sorted(exact)}, got {sorted(converted)}")
    at_once = numbers(stock, inputs, real, gradients)
    ways = [_all_errors(at_once, exact)]
    ways.append(_all_errors(numbers(stock, inputs, real, gradients, by_row=True), exact))
    shuffled = WAYS - len(ways)
    for seed in range(shuffled + 2):
        with _ShuffledSums(seed, by_contexts=seed >= shuffled):
            ways.append(_all_errors(numbers(stock, inputs, real, gradients), exact))
    found = []
    for name, reference in exact.items():
        max_error, rms_error = _errors(converted[name], reference)
        max_scale, rms_scale = _size(reference)
        u = UNIT_ROUNDOFF[converted[name].dtype]
        max_yardstick, rms_yardstick = map(max, zip(*(way[name] for way in ways), strict=True))
        finding = Finding(
            name,
            max_error,
            2 * (max_yardstick + u * max_scale),
            rms_error,
            2 * (rms_yardstick + u * rms_scale / math.sqrt(3)),
        )
        found.append((finding, ways[0][name][0]))
    return found


class _ShuffledSums(TorchDispatchMode):
    """The terms of each matrix product are summed in a random order, in the backward too.
    by_contexts: the rows' sums in softmax's backward are made of the contexts."""

    def __init__(self, seed: int, by_contexts: bool = False) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._by_contexts = by_contexts
        # By the address of what was made, which is kept for that: softmax's outputs; of them the
        # contexts; and the first operand of any other batched product, which may be dP = dO V^T.
        self._shares: dict[int, torch.Tensor] = {}
        self._contexts: dict[int, torch.Tensor] = {}
        self._operands: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is _SOFTMAX_BACKWARD and self._by_contexts:
            return self._softmax_backward(*args)
        given = args
        if func in _PRODUCTS:
            *rest, a, b = args
            order = torch.randperm(a.shape[-1], generator=self._generator).to(a.device)
            args = (*rest, a.index_select(-1, order), b.index_select(-2, order))
        made = func(*args, **(kwargs or {}))
        if func is _SOFTMAX:
            self._shares[made.data_ptr()] = made
        elif func is _BATCHED and given[0].data_ptr() in self._shares:
            self._contexts.setdefault(given[0].data_ptr(), made)  # the next is dV = P^T dO
        elif func is _BATCHED:
            self._operands[made.data_ptr()] = given[0], made
        return made

    def _softmax_backward(
        self, dp: torch.Tensor, p: torch.Tensor, dim: int, dtype: torch.dtype
    ) -> torch.Tensor:
        context = self._contexts.get(p.data_ptr())
        operand, _ = self._operands.get(dp.data_ptr(), (None, None))
        if context is None or operand is None or operand.shape != context.shape:
            return _SOFTMAX_BACKWARD(dp, p, dim, dtype)
        high = torch.promote_types(dtype, torch.float32)
        sums = (operand.to(high) * context.to(high)).sum(-1).view(*dp.shape[:-1], 1)
        return (p.to(high) * (dp.to(high) - sums)).to(dtype)


_BATCHED = torch.ops.aten.bmm.default
_SOFTMAX = torch.ops.aten._softmax.default
_SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data.default
_PRODUCTS = tuple(
    getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm")
)


def _size(values: torch.Tensor) -> tuple[float, float]:
    """The largest magnitude and the root mean square."""
    if not values.numel():
        return 0.0, 0.0
    values = values.double()
    return values.abs().max().item(), values.square().mean().sqrt().item()


def _errors(actual: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    if actual.shape != reference.shape:
        raise ValueError(f"expected shape {list(reference.shape)}, got {list(actual.shape)}")
    return _size(actual.double() - reference.double())


def _all_errors(
    actual: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    return {name: _errors(actual[name], reference) for name, reference in exact.items()}
