"""What a converted module knows: how it was converted, and whether bertfast is switched off."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

ATTRIBUTE = "_bertfast"  # a converted module's Settings
KEPT = ATTRIBUTE + "_kept"  # why its last batch with padding kept it, for reports


@dataclass(frozen=True)
class Settings:
    backend: str
    keep_padding: str | None = None  # the reason; None: it is taken out

    @property
    def packed(self) -> bool:
        return self.keep_padding is None


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's class is one of those that `optimize` puts in another's place."""
    return hasattr(type(module), "_original")


def is_converted(module: nn.Module) -> bool:
    """Whether `optimize` has been here. A swapped class alone doesn't say so: `type(model)(config)`
    makes an instance of it, which runs its original code until it is optimized."""
    return ATTRIBUTE in module.__dict__ and is_swapped(module)


_off = threading.local()


def is_disabled() -> bool:
    return getattr(_off, "depth", 0) > 0


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Within it, in this thread, converted models run their original code."""
    _off.depth = getattr(_off, "depth", 0) + 1
    try:
        yield
    finally:
        _off.depth -= 1
