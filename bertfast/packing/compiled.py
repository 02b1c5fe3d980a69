"""A compiled module, for what it does on the host in place of Python: either of the two has it."""

import functools
import importlib
from types import ModuleType


@functools.cache
def module() -> ModuleType | None:
    """None where neither was built."""
    for name in ("_host", "_cuda"):
        try:
            return importlib.import_module(f"bertfast.{name}")
        except ImportError:
            continue
    return None
