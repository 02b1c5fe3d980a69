"""A family of models: the names of its classes in transformers, and what is put in front of each.

A family is one file in `families/`, whose FAMILY is found there.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    title: str  # as its users call it
    prefix: str  # of its models' class names
    module: str  # in which its classes are
    swapped: Mapping[str, Any]  # names of its layer, encoder and model -> what is put in front
    heads: Mapping[str, Any]  # the same of heads of masked language models
    # For the README's table: what is converted, and what runs its original code besides what does
    # so in all.
    layer: str = "post-norm"
    original: str = "-"
