"""A model's modules: to be read, or to be called.

A Linear's weight is read only if calling the module would do just x @ weight^T + bias. One that is
anything else (LoRA, quantised, hooked, offloaded, parametrized) is called, so that its work is
done. Likewise a LayerNorm and a Dropout.
"""

from typing import Any, NamedTuple

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


def untouched(module: nn.Module, kind: type, clean: bool = False) -> bool:
    """True if the module is exactly of this class and its call has no hook but one that brings its
    input to where its weights are. clean: known to have none."""
    if type(module) is not kind:
        return False
    return clean or (
        (not is_hooked(module) or place_of(module) is not None) and has_own_forward(kind)
    )


def has_own_forward(kind: Any) -> bool:
    """True if the class has the forward that was written with it: another has to be called."""
    return kind.forward.__module__ == kind.__module__


def is_hooked(module: nn.Module) -> bool:
    """True if the module's call does more than its class's forward."""
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


def place_of(module: nn.Module) -> Any:
    """The device to which accelerate brings a module's input, where its weights stay; None unless
    that is all that hangs on the module. `dispatch_model`, or device_map, does so to all."""
    hook: Any = module.__dict__.get("_hf_hook")
    kind = type(hook)
    if (kind.__module__, kind.__name__) != ("accelerate.hooks", "AlignDevicesHook"):
        return None
    others = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    more = hook.offload or hook.io_same_device or hook.no_grad
    if any(others) or more or torch_module._has_any_global_hook():
        return None
    before = module.__dict__.get("_old_forward")
    own = getattr(before, "__self__", None) is module
    own = own and getattr(before, "__func__", None) is type(module).forward
    return hook.execution_device if own else None


def is_spread(module: nn.Module) -> bool:
    """True if what is inside a module brings its inputs to several devices."""
    places = set(map(place_of, module.modules()))
    places.discard(None)
    return len(places) > 1


def plain(tensor: torch.Tensor | None) -> bool:
    """True for an ordinary tensor: not sharded, not quantised, not a subclass."""
    return type(tensor) in _PARAMETERS


def _parameter(module: nn.Module, name: str) -> Any:
    """A parameter, by the dicts, as attributes of a Module take three times as long. In replicas of
    nn.DataParallel it is an ordinary attribute."""
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def read_linear(linear: "nn.Module | Weights", clean: bool = False) -> "nn.Module | Weights":
    if isinstance(linear, Weights) or not untouched(linear, nn.Linear, clean):
        return linear
    weight = _parameter(linear, "weight")
    return Weights(weight, _parameter(linear, "bias")) if plain(weight) else linear


def read_norm(norm: Any, clean: bool = False) -> "nn.Module | Norm":
    if not untouched(norm, nn.LayerNorm, clean) or len(norm.normalized_shape) != 1:
        return norm
    weight = _parameter(norm, "weight")
    return Norm(weight, _parameter(norm, "bias"), norm.eps) if plain(weight) else norm


def read_dropout(dropout: Any, clean: bool = False) -> float | nn.Module:
    """The share that is dropped now."""
    if dropout is None:
        return 0.0
    if not untouched(dropout, nn.Dropout, clean):
        return dropout
    return float(dropout.p) if dropout.training else 0.0
