"""The modules that act on each token alone: only around those may tokens change places.

A packed batch is one long row. A module that draws once per row (DropPath), adds to a row's
beginning (soft prompts) or otherwise knows rows would act on the whole batch as if it were one. A
class can't be asked whether it does, so those that don't are listed here; around any other the
batch stays padded.
"""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .hooks import sees_layout
from .modules import has_own_forward, is_hooked

_CLASSES: tuple[type, ...] = (
    *(nn.Linear, NonDynamicallyQuantizableLinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm),
    *(nn.Dropout, nn.AlphaDropout, nn.Identity),
    *(nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardswish),
    *(nn.Module, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Sequential),
)
COMMON: tuple[type[nn.Module], ...] = nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding
# PEFT's methods. Not among them: poly and xlora, which route or scale each row by itself.
_PEFT = (
    *("lora", "adalora", "ia3", "loha", "lokr", "oft", "boft", "hra", "hira", "glora", "gralora"),
    *("delora", "randlora", "vera", "vblora", "fourierft", "waveft", "c3a", "miss", "shira", "osf"),
    *("ln_tuning", "trainable_tokens", "lycoris_utils", "tuners_utils", "_buffer_dict"),
)
# Packages of modules that act on each token alone: by the beginning of the class's module.
_PACKAGES = (
    *("transformers.activations", "torch.ao.nn.", "torchao.", "bitsandbytes.nn."),
    "optimum.quanto.",
    *(f"peft.tuners.{method}" for method in _PEFT),
)

_known: dict[type, bool] = dict.fromkeys(_CLASSES, True)


def why_rows_are_seen(module: nn.Module, own: Collection[type] = ()) -> str | None:
    """Why tokens must not change places around this module, in words that follow "in ..."; None if
    they may. own: further classes that act on each token alone, the module's and its parts'."""
    for kind in COMMON:
        if not has_own_forward(kind):
            return f"the forward of {kind.__name__}, which was replaced, may act on rows"
    left = [module]
    while left:
        module = left.pop()
        kind = type(module)
        if not (_known.get(kind) or kind in own or _acts_per_token(kind)):
            return f"a {kind.__name__} may act on rows"
        if is_hooked(module) and sees_layout(module):
            return f"a hook on a {kind.__name__} sees its rows"
        if module._modules:
            left += _parts(module)
    return None


def _acts_per_token(kind: type) -> bool:
    known = _known.get(kind)
    if known is None:
        known = _known[kind] = _is_listed(kind)
    return known


def _is_listed(kind: type) -> bool:
    if kind.__module__.startswith(_PACKAGES):
        return True
    # What torch derives from a class while it parametrizes or shards its weights.
    derived = kind.__name__.startswith(("Parametrized", "FSDP")) and len(kind.__mro__) > 2
    return derived and any(_acts_per_token(base) for base in kind.__mro__[1:3])


def _parts(module: nn.Module) -> Iterable[nn.Module]:
    """The modules inside, in their order, but for those that act on weights."""
    parts: dict[str, Any] = module._modules
    if None not in parts.values() and "parametrizations" not in parts:
        return reversed(parts.values())
    return [
        part for name, part in parts.items() if part is not None and name != "parametrizations"
    ][::-1]
