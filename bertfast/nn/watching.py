"""The comparisons that tell a model's call that nothing changed since an earlier one.

In Python here; the compiled modules have the same by the same names (csrc/bindings/watch.cpp), and
take half the time. Lists that belong together have one length.
"""

import functools
from itertools import repeat
from operator import getitem, is_
from typing import Any

import torch

from ..packing import compiled


@functools.cache
def comparisons() -> Any:
    """The compiled module, or where none was built this one."""
    return compiled.module() or _IN_PYTHON


def of_kinds(modules: list, kinds: list[type]) -> bool:
    """True if these are modules of exactly these classes."""
    return list(map(type, modules)) == kinds


def all_empty(dicts: list[dict]) -> bool:
    return not any(dicts)


def none_has(dicts: list[dict], key: str) -> bool:
    return not any(map(dict.__contains__, dicts, repeat(key)))


def holds(dicts: list[dict], names: list[str], objects: list) -> bool:
    """True if the dicts have these very objects under these names."""
    try:
        return all(map(is_, map(getitem, dicts, names), objects))
    except KeyError:
        return False


def of_sizes(dicts: list[dict], sizes: list[int]) -> bool:
    return list(map(len, dicts)) == sizes


def memory_of(tensors: list[torch.Tensor]) -> Any:
    """Addresses and forms of tensors, to be compared as a whole."""
    return [(t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in tensors]


class _InPython:
    of_kinds = staticmethod(of_kinds)
    all_empty = staticmethod(all_empty)
    none_has = staticmethod(none_has)
    holds = staticmethod(holds)
    of_sizes = staticmethod(of_sizes)
    memory_of = staticmethod(memory_of)


_IN_PYTHON = _InPython()
