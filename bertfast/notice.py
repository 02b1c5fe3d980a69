"""Warnings: each text once in a process, at the user's line."""

import sys
import threading
import warnings

from . import tracing

# Packages between the user's line and a converted module.
_BETWEEN = frozenset(
    ("bertfast", "torch", "transformers", "sentence_transformers", "peft", "accelerate")
    + ("contextlib", "functools")
)

_told: set[str] = set()
_telling = threading.Lock()


def warn_once(text: str) -> None:
    if tracing.is_compiling():
        return
    with _telling:
        if text in _told:
            return
        _told.add(text)
    warnings.warn(f"bertfast {text}", stacklevel=_level())


def _level() -> int:
    """How far up the calls the first line is that none of those packages has, for warn_once."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _BETWEEN:
            break
        frame, level = frame.f_back, level + 1
    return level
