"""The facts of a model's modules: found in one pass, and again only after something changed.

A call asks for each module of each layer whether it is of the class that it was, whether a hook or
another forward has to be called, and so on. `Watch` keeps the answers beside a list of everything
they depend on, which is compared in a few microseconds a layer.
"""

from collections.abc import Callable, Iterable
from itertools import chain, repeat
from operator import getitem
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import tracing
from .hooks import has_global_hooks
from .modules import has_own_forward
from .per_token import COMMON
from .watching import comparisons

WATCH = "_bertfast_watch"  # where a model keeps its own
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Facts(NamedTuple):
    """The answers for one model, in words where they are a reason."""

    untold: str | None  # why its layers can't be told how the batch lies
    unfused: str | None = None  # why some layer runs its original code
    rows_seen: str | None = None  # why tokens must not change places in the layers
    embeddings_plain: bool = False  # what comes before the layers acts on each token alone
    layers: tuple[nn.Module, ...] = ()
    beside: tuple[nn.Module, ...] = ()  # what is called before, between or after them
    tables: tuple[nn.Module, ...] = ()  # what makes tables of positions, which graphs keep
    dropouts: tuple[nn.Module, ...] = ()  # of the layers
    numbers: dict[int, int] | None = None  # of the layers by their ids; None if one comes twice
    clean: bool = False  # no module has a hook: all of a known class may be read


def layer_facts(layers: Iterable[nn.Module]) -> dict[str, Any]:
    """The facts that are found in the same way for every model."""
    layers = tuple(layers)
    numbers = {id(layer): number for number, layer in enumerate(layers)}
    dropouts = (module for layer in layers for module in layer.modules())
    return dict(
        layers=layers,
        dropouts=tuple(m for m in dropouts if isinstance(m, (nn.Dropout, nn.MultiheadAttention))),
        numbers=numbers if len(numbers) == len(layers) else None,
    )


def facts_of(
    model: nn.Module,
    find: Callable[[], Facts],
    attributes: Callable[[], list[tuple[dict, str]]],
) -> Facts:
    """The facts that `find` gives, now or at an earlier call after which nothing changed.
    attributes: of the modules, which `find` looks at too, by the dicts of attributes or
    parameters."""
    if tracing.is_compiling():
        return find()
    watch = model.__dict__.get(WATCH)
    if watch is not None and watch.holds():
        return watch.facts
    facts = find()
    if facts.untold is None and facts.unfused is None:
        watch = Watch(model, facts, attributes())
        if watch.facts is not None and watch.holds():
            model.__dict__[WATCH] = watch
            return watch.facts
    return facts


_get = MappingProxyType.get


class Watch:
    """The facts of a model without hooks, and a list of all they depend on."""

    def __init__(
        self,
        model: nn.Module | None = None,
        facts: Facts | None = None,
        attributes: Iterable[tuple[dict, str]] = (),
    ) -> None:
        self.facts: Facts | None = None
        if model is None or facts is None:  # a copy's, which has to look for itself
            return
        self.facts = facts._replace(clean=True)
        self._compare = comparisons()
        # All but the model itself, whose own hooks are called around its forward.
        self._modules = [module for module in model.modules() if module is not model]
        self._kinds = list(map(type, self._modules))
        self._dicts = [module.__dict__ for module in self._modules]
        children = [module._modules for module in (model, *self._modules)]
        self._containers = [names for names in children if names]
        self._sizes = list(map(len, self._containers))
        places = [(names, name) for names in self._containers for name in names]
        self._owners, self._names = [names for names, _ in places], [name for _, name in places]
        self._children = list(map(getitem, self._owners, self._names))
        self._attributes = list(attributes)
        self._values = self._read_attributes()
        classes = {base for kind in (*self._kinds, *COMMON) for base in kind.__mro__}
        self._own = all(map(has_own_forward, COMMON))
        own = [vars(base) for base in classes if "forward" in vars(base)]
        self._classes, self._forwards = own, [names["forward"] for names in own]
        # What has to be empty: all hooks, and the modules inside those that had none.
        self._empty = [d[name] for d in self._dicts for name in _HOOKS]
        self._empty += [names for names in children if not names]
        self._handles: int | None = (
            None  # how many hooks there had been, anywhere, at the last look
        )

    def __deepcopy__(self, memo: dict) -> "Watch":
        return Watch()

    def __reduce__(self) -> tuple:
        return Watch, ()

    def holds(self) -> bool:
        if self.facts is None or not self._own:
            return False
        compare = self._compare
        return (
            compare.all_empty(self._empty)
            and compare.none_has(self._dicts, "forward")
            and compare.of_kinds(self._modules, self._kinds)
            and compare.of_sizes(self._containers, self._sizes)
            and compare.holds(self._owners, self._names, self._children)
            and self._read_attributes() == self._values
            and list(map(_get, self._classes, repeat("forward"))) == self._forwards
            and not has_global_hooks()
            and self._no_new_hooks()
        )

    def _read_attributes(self) -> list[object]:
        return [values.get(name) for values, name in self._attributes]

    def _no_new_hooks(self) -> bool:
        """A hook may have come in a dict that is new itself; every hook has a number."""
        handles = RemovableHandle.next_id
        if self._handles != handles:
            if any(chain.from_iterable((d[name] for name in _HOOKS) for d in self._dicts)):
                return False
            self._handles = handles
        return True
