"""Triton's interpreter, several times quicker by what it does again without need. The numbers stay
as they are.

At each launch it looks for the language's builtins, puts its own functions in their place, and
takes them back at the end. At each call of a function within a kernel, thousands a launch, it does
so once more, though all are in place. For each tensor it makes its type, its shape and the table of
numpy's dtypes anew, and for two of one shape the shape that both can be broadcast to. And it looks
whether each sum and product of integers overflows, and says so to nobody unless its option `debug`
is set.
"""

import dataclasses
import functools
import inspect
from typing import Any

_OF_A_SHAPE = {"shape", "numel"}
_OF_A_TENSOR = {"handle", "type", "dtype", *_OF_A_SHAPE}


def quicken() -> None:
    """Of an interpreter that isn't as it is known here, nothing changes."""
    import triton.language as tl
    from triton.runtime import interpreter

    known = hasattr(interpreter, "_LangPatchScope") and hasattr(tl.core, "block_type")
    if not known or hasattr(interpreter._patch_lang, "real"):
        return
    interpreter._patch_lang = _Once(interpreter._patch_lang)
    interpreter._patch_builtin = _patch_builtin(interpreter._patch_builtin)
    interpreter._get_np_dtype = _np_dtype(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _block_type(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = _tensor(tl.core.tensor.__init__)
    semantic = interpreter.interpreter_semantic
    semantic.broadcast_impl_value = _broadcast(semantic.broadcast_impl_value)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


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


def _patch_builtin(real: Any) -> Any:
    """`_patch_builtin`, which looks for a module's or a class's builtins once."""
    import triton.language as tl
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}

    @functools.wraps(real)
    def patch(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if tl.core.is_builtin(member)]
        for name in names[package]:
            if tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    return patch


def _np_dtype(real: Any) -> Any:
    """`_get_np_dtype`, asked once for each dtype."""
    import triton.language as tl

    known: dict[str, Any] = {}

    @functools.wraps(real)
    def np_dtype(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if element.name not in known:
            known[element.name] = real(element)
        return known[element.name]

    return np_dtype


def _block_type(real: Any) -> Any:
    """`block_type.__init__`, once for each type, but for pointers, whose names don't tell all."""
    import triton.language as tl

    known: dict[tuple, dict[str, Any]] = {}

    @functools.wraps(real)
    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape) if type(element_ty) is tl.dtype else None
        if key in known:
            vars(self).update(known[key])
            return
        real(self, element_ty, shape)
        if key is not None:
            known[key] = dict(vars(self))

    return init


def _tensor(real: Any) -> Any:
    """`tensor.__init__`, which makes a shape once."""
    known: dict[tuple, dict[str, Any]] = {}

    @functools.wraps(real)
    def init(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape in known:
            vars(self).update(known[shape], handle=handle, type=type, dtype=type.scalar)
            return
        real(self, handle, type)
        if vars(self).keys() == _OF_A_TENSOR:
            known[shape] = {name: getattr(self, name) for name in _OF_A_SHAPE}

    return init


def _broadcast(real: Any) -> Any:
    """`broadcast_impl_value`, for two tensors of different shapes."""

    @functools.wraps(real)
    def broadcast(lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else real(lhs, rhs)

    return broadcast
