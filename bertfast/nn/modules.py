"""Modules of somebody's, to be read or to be called.

A Linear's weight is read only if calling the module would do just x @ weight^T + bias. One that is
anything else (LoRA, quantised, hooked, offloaded, parametrized) is called, so its owner's work is
done. Likewise a LayerNorm and a Dropout.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from ..ops.layer_norm.run import Norm

_PARAMETERS = (nn.Parameter, torch.Tensor)


class Weights(NamedTuple):
    """A Linear's parameters, where no module's call makes the product."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def untouched(module: nn.Module, kind: type) -> bool:
    """Whether the module is exactly of this class and nothing hangs on its call."""
    return type(module) is kind and not is_hooked(module) and has_own_forward(kind)


def has_own_forward(kind: type) -> bool:
    """Whether the class has the forward that was written with it, and nobody has put another there:
    that one has to be called."""
    return kind.forward.__module__ == kind.__module__


def is_hooked(module: nn.Module) -> bool:
    """Whether something happens at the module's call besides its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        # These four are for every module that there is.
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def readable_linear(module: "nn.Module | Weights") -> bool:
    if type(module) is Weights:
        return True
    return untouched(module, nn.Linear) and plain(module.weight)


def plain(tensor: torch.Tensor) -> bool:
    """Whether a parameter is an ordinary tensor: not sharded, not packed, not a subclass."""
    return type(tensor) in _PARAMETERS


def readable_norm(module: nn.Module) -> bool:
    return (
        untouched(module, nn.LayerNorm)
        and plain(module.weight)
        and len(module.normalized_shape) == 1
    )


def read_linear(linear: "nn.Module | Weights") -> "nn.Module | Weights":
    if readable_linear(linear) and type(linear) is not Weights:
        return Weights(linear.weight, linear.bias)
    return linear


def read_norm(norm: nn.Module) -> "nn.Module | Norm":
    """Its bias is zeros if it has none."""
    if not readable_norm(norm):
        return norm
    return Norm(
        norm.weight, torch.zeros_like(norm.weight) if norm.bias is None else norm.bias, norm.eps
    )


def read_dropout(dropout: nn.Module | None) -> float | nn.Module:
    """The share that is dropped now."""
    if dropout is None:
        return 0.0
    if not untouched(dropout, nn.Dropout):
        return dropout
    return float(dropout.p) if dropout.training else 0.0
