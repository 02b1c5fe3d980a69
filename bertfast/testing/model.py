"""A whole model's numbers beside the stock model's: outputs, and the gradient of every parameter.

    error <= 2 * (error of the stock model + u * scale)

for the largest error and for the root mean square. The oracle is the stock model in float64. The
yardstick is the stock model itself in the tested dtype, the worse of two ways to run it: the
batch at once, and one row after another. scale is |reference|.

The largest error of one gradient is one draw from a wide distribution: right ways to run MiniLM
(SDPA or eager, at once or by rows) differ by eight times in one parameter, while their errors over
all parameters agree within a fifth. So a gradient's yardstick is the larger of its own and of what
the stock model errs at worst in any gradient, relative to that gradient's own size. Gradients that
are nothing but cancellation (a key's bias has none but rounding) say nothing about others. Such a
bias has its own yardstick or its weight's: the errors of the same gradients add up in both, in the
weight's times a LayerNorm's output, whose size is about 1.

What is compared is what both define: real tokens, not padding.
"""

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .budget import UNIT_ROUNDOFF, Finding

SEED = 1
# What two float32 runs of an encoder may differ by in a hidden state, which a LayerNorm has made
# about 1 in size. A layer rounds some 10 values on the way and inner / 16 partial sums of its
# longest product. For six layers with 1536 that is sqrt(6 * (10 + 96)) = 25 u, twice that as a
# product passes on the errors of both operands, sqrt(2) times that between two runs; the largest of
# 10^5 values is 4.4 standard deviations off: 313 u, rounded up.
HIDDEN_ATOL = 2e-5
DETERMINED = 2.0**-10  # a gradient of which rounding leaves three digits is one


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
    rows = next(iter(inputs.values())).shape[0]
    parts = [slice(n, n + 1) for n in range(rows)] if by_row else [slice(rows)]
    outputs: dict[str, list[torch.Tensor]] = {}
    model.zero_grad(set_to_none=True)
    weights: dict[str, torch.Tensor] = {}
    for part in parts:
        with torch.set_grad_enabled(gradients):
            result = model(**{name: value[part] for name, value in inputs.items()})
            loss = 0.0
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
    at_once = numbers(stock, inputs, real, gradients)
    row_by_row = numbers(stock, inputs, real, gradients, by_row=True)
    converted = numbers(convert(copy.deepcopy(stock)), inputs, real, gradients)
    if converted.keys() != exact.keys():
        raise ValueError(f"expected {sorted(exact)}, got {sorted(converted)}")
    yardsticks = _yardsticks(exact, at_once, row_by_row)
    found = []
    for name, reference in exact.items():
        max_error, rms_error = _errors(converted[name], reference)
        max_scale, rms_scale = _size(reference)
        u = UNIT_ROUNDOFF[converted[name].dtype]
        max_yardstick, rms_yardstick = yardsticks[name]
        finding = Finding(
            name,
            max_error,
            2 * (max_yardstick + u * max_scale),
            rms_error,
            2 * (rms_yardstick + u * rms_scale / math.sqrt(3)),
        )
        found.append((finding, _errors(at_once[name], reference)[0]))
    return found


def _yardsticks(exact, *runs) -> dict[str, tuple[float, float]]:
    """For each tensor what the stock model's largest error and its RMS are taken to be."""
    own, relative = {}, [(0.0, 0.0)]
    for name, reference in exact.items():
        errors = [_errors(run[name], reference) for run in runs]
        own[name] = tuple(map(max, zip(*errors, strict=True)))
    for name, reference in exact.items():
        if not name.startswith("d "):
            continue
        if own[name][1] < DETERMINED * _size(reference)[1]:
            relative.append(
                tuple(e / size for e, size in zip(own[name], _size(reference), strict=True))
            )
        elif name.endswith(".bias"):
            weight = own.get(name.removesuffix("bias") + "weight", own[name])
            own[name] = tuple(map(max, zip(own[name], weight, strict=True)))
    typical = tuple(map(max, zip(*relative, strict=True)))
    return {
        name: tuple(
            max(error, share * size) if name.startswith("d ") else error
            for error, share, size in zip(own[name], typical, _size(reference), strict=True)
        )
        for name, reference in exact.items()
    }


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
