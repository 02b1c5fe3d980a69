"""Hooks of a module's call: those that have to be called, and those that see tokens moved."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .modules import is_hooked, place_of

# transformers' own hooks, which record hidden states and attentions: once asked for they stay on a
# model for good, and do nothing unless asked again.
_RECORDERS = ("transformers.utils.output_capturing", "transformers.utils.generic")
# Hooks that move parameters and look at no value.
_MOVERS = ("torch.distributed.", "accelerate.hooks")


def has_user_hooks(module: nn.Module) -> bool:
    """True if a hook would be missed if the module weren't called."""
    if not is_hooked(module) or place_of(module) is not None:
        return False
    return _is_hooked_by_others(module, _RECORDERS)


def has_global_hooks() -> bool:
    """True if there is a hook for all modules."""
    return torch_module._has_any_global_hook()


def sees_layout(module: nn.Module) -> bool:
    """True if a hook looks at the module's inputs or outputs, and so at their shape."""
    return is_hooked(module) and _is_hooked_by_others(module, _RECORDERS + _MOVERS)


def _is_hooked_by_others(module: nn.Module, harmless: tuple[str, ...]) -> bool:
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return True
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks += torch_module._global_forward_hooks.values()
    hooks += torch_module._global_forward_pre_hooks.values()
    hooks += _accelerate_hooks(module.__dict__.get("_hf_hook"))
    forward = module.__dict__.get("forward")
    # transformers 5.0 records by a forward on the instance, and leaves the class's own there.
    if forward is not None and not is_own_forward(module, forward, type(module)):
        hooks.append(forward)
    return any(not _origin(hook).startswith(harmless) for hook in hooks)


def _accelerate_hooks(hook: Any) -> Iterator[Callable]:
    """The calls that accelerate makes before and after a module's forward. Its own hooks move
    parameters; a user's may do anything."""
    for one in getattr(hook, "hooks", () if hook is None else (hook,)):
        yield from (type(one).pre_forward, type(one).post_forward)


def is_replaced(module: nn.Module) -> bool:
    """True if the instance has a forward that may not call the class's."""
    forward = module.__dict__.get("forward")
    return not (
        forward is None
        or is_own_forward(module, forward, type(module))
        or is_own_forward(module, module.__dict__.get("_old_forward"), type(module))  # accelerate
        or _origin(forward).startswith(_RECORDERS)
    )


def is_own_forward(module: nn.Module, forward: object, kind: type[nn.Module]) -> bool:
    """True if an attribute of the module is just the class's own forward."""
    return (
        getattr(forward, "__self__", None) is module
        and getattr(forward, "__func__", None) is kind.forward
    )


def _origin(hook: Callable) -> str:
    """The module in which a hook was written, whatever it says it wraps."""
    function = getattr(hook, "func", hook)  # of a partial
    function = getattr(function, "__func__", function)  # of a method
    return getattr(function, "__globals__", {}).get("__name__", "")
