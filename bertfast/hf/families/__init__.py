"""The families, each a file of its own here with a FAMILY."""

import importlib
import pkgutil

from ..family import Family

FAMILIES: tuple[Family, ...] = tuple(
    importlib.import_module(f"{__name__}.{file.name}").FAMILY
    for file in pkgutil.iter_modules(__path__)
)
