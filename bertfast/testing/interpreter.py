"""Triton's interpreter, quicker by what it does again without need. The numbers stay as they are.

At each launch it puts its own functions in place of the language's builtins, and takes them back
at the end. At each call of a function within a kernel, thousands a launch, it does so once more,
though all are in place: that took half of an interpreted kernel's time. And it makes the table of
numpy's dtypes anew for each tensor.
"""

import functools
from typing import Any


def quicken() -> None:
    """Of an interpreter that isn't as it is known here, nothing changes."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope") and not hasattr(interpreter._patch_lang, "real"):
        interpreter._patch_lang = _Once(interpreter._patch_lang)
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)


class _Once:
    """The interpreter's `_patch_lang`, which patches what a function sees of the language: each
    module once from a launch's begin, whose scope is the one that is restored, to its end."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self._seen = functools.cache(_languages)
        self._patched: set[str] = set()

    def __call__(self, fn: Any) -> Any:
        if self._patched and self._seen(fn) <= self._patched:
            return None  # a call within a kernel asks for no scope
        scope = self.real(fn)
        self._patched |= self._seen(fn)
        restore = scope.restore

        def restored() -> None:
            self._patched.clear()
            restore()

        scope.restore = restored
        return scope


def _languages(fn: Any) -> frozenset[str]:
    """The modules that are patched for a function: of those that are its globals."""
    import triton.language as tl

    modules = {id(tl): "tl", id(tl.core): "core"}
    return frozenset(modules[id(each)] for each in fn.__globals__.values() if id(each) in modules)


def _remembered(real: Any) -> Any:
    """`_get_np_dtype`, asked once for each dtype."""
    import triton.language as tl

    known: dict[str, Any] = {}

    def np_dtype(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if element.name not in known:
            known[element.name] = real(element)
        return known[element.name]

    np_dtype.real = real  # type: ignore[attr-defined]
    return np_dtype
