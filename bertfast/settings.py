"""What a converted module knows: how it was converted, and whether bertfast is switched off."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

ATTRIBUTE = "_bertfast"  # a converted module's Settings


@dataclass(frozen=True)
class Settings:
    backend: str
    keep_padding: str | None = None  # the reason; None: it is taken out

    @property
    def packed(self) -> bool:
        return self.keep_padding is None


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
