"""bertfast's kernels on the simulated GPU: CUDA's by the host build, Triton's by its interpreter.

Both work on the devices' own memory. Each launch is looked at first, as a GPU would only fail or
compute nonsense: all tensors lie on one device, and Triton's on the current one.
"""

import importlib
import threading
from typing import NamedTuple

import torch
from triton.runtime import interpreter

from . import cuda


class Launch(NamedTuple):
    kernel: str
    device: int


launches: list[Launch] = []


def _host_view(value):
    """A tensor of a device as the CPU's, on the same memory; in tuples too."""
    if isinstance(value, tuple):
        return tuple(map(_host_view, value))
    if isinstance(value, torch.Tensor) and value.is_cuda:
        return torch.ops.simulated_gpu.host_view(value.detach())
    return value


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _device(name: str, tensors) -> int:
    """The device of a launch's tensors."""
    found = {tensor.device for tensor in tensors}
    if len(found) != 1 or next(iter(found)).type != "cuda":
        raise AssertionError(f"{name} got tensors on {sorted(map(str, found))}")
    index = next(iter(found)).index
    for tensor in tensors:
        if tensor.numel() and (lies := cuda.device_of(tensor.data_ptr())) != index:
            raise AssertionError(f"{name} on cuda:{index} got memory of device {lies}")
    return index


class _Module:
    """The compiled module for tensors on a device."""

    def __init__(self, host):
        self._host = host

    def __getattr__(self, name):
        function = getattr(self._host, name)

        def call(*args):
            tensors = list(_tensors(args))
            if not tensors:
                return function(*args)  # it launches nothing
            index = _device(name, tensors)
            if name.endswith(("_forward", "_backward")):
                launches.append(Launch(name, index))
            with torch.no_grad():
                return function(*map(_host_view, args))

        return call


def _interpret(self, *args, **kwargs):
    """GridExecutor.__call__: a launch in the interpreter."""
    tensors = list(_tensors((*args, *kwargs.values())))
    if any(tensor.is_cuda for tensor in tensors):
        name = self.fn.__name__
        index, current = _device(name, tensors), torch.cuda.current_device()
        if index != current:
            raise AssertionError(f"{name} is for cuda:{index}, and cuda:{current} is current")
        launches.append(Launch(name, index))
        with torch.no_grad():
            args = tuple(map(_host_view, args))
            kwargs = {key: _host_view(value) for key, value in kwargs.items()}
    with _interpreting:
        return _interpret_on_host(self, *args, **kwargs)


_interpreting = threading.Lock()  # the interpreter is one for all threads
_interpret_on_host = interpreter.GridExecutor.__call__


def install() -> None:
    from bertfast.ops import native

    host = importlib.import_module("bertfast._host")
    module = _Module(host)
    native.MODULE_OF["cuda"] = "_host"
    native.module_for = lambda tensor: module if tensor.is_cuda else host
    native.unsupported_reason.cache_clear()
    interpreter.GridExecutor.__call__ = _interpret
