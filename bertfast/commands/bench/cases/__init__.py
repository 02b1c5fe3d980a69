"""The timed cases of every op: a module for each, found in this folder.

A module has a subclass of OpCase and three lists of such cases, most important first:

    gpu_cases   what a GPU is measured at
    cpu_cases   what a CPU can time in a minute, in float32
    dry_cases   one tiny case a pass, for the interpreter, the host build and calls' overhead
"""

import importlib
import itertools
import pkgutil
from types import ModuleType

from ..op_case import OpCase


def _modules() -> list[ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def gpu_cases() -> list[OpCase]:
    """The ops take turns, so that a run that is cut short has the most important of each."""
    turns = itertools.zip_longest(*(module.gpu_cases() for module in _modules()))
    return [case for turn in turns for case in turn if case is not None]


def cpu_cases() -> list[OpCase]:
    return [case for module in _modules() for case in module.cpu_cases()]


def dry_cases() -> list[OpCase]:
    return [case for module in _modules() for case in module.dry_cases()]
