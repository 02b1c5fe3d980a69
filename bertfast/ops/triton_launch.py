"""Launches of Triton kernels. A form of a kernel that has run before starts past Triton's binder.

At each launch the binder looks at every argument to find the form, and keeps it by a text that it
writes anew. Here the form is found by what these kernels differ in, and the kernel is started as
Triton's own `CompiledKernel` is, with addresses in place of tensors.
"""

from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .. import tracing
from ..checks import INT32_MAX
from .triton_lib import INTERPRETED

Pointers = tuple[torch.Tensor | None, ...]

# How many sizes of calls are kept for a kernel. All of one form are the same compiled kernel.
MOST_KNOWN = 4096


class Launch:
    """A kernel's launches. Its parameters are, in this order: pointers, the first of them never
    None; strides, integers on which Triton specialises; numbers, on whose values nothing depends;
    constants.

    A float's type is at its parameter, as Triton would take one that is given as an int for one.
    """

    every: list["Launch"] = []

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._known: dict[tuple, Any] = {}  # by the strides themselves
        self._forms: dict[tuple, Any] = {}  # by what Triton sees in the strides
        Launch.every.append(self)

    def __call__(
        self,
        grid: tuple[int, ...],
        pointers: Pointers,
        strides: tuple[int, ...],
        numbers: tuple[float, ...],
        constants: tuple,
        num_warps: int = 4,
    ) -> None:
        if INTERPRETED:
            self.kernel[grid](*pointers, *strides, *numbers, *constants)
            return
        types: list[torch.dtype | None] = []
        addresses: list[int | None] = []
        together = 0
        for pointer in pointers:
            if pointer is None:
                types.append(None)
                addresses.append(None)
            else:
                address = pointer.data_ptr()
                types.append(pointer.dtype)
                addresses.append(address)
                together |= address
        aligned = None if together % 16 == 0 else tuple([a and a % 16 for a in addresses])
        wide = None if max(numbers) <= INT32_MAX else tuple([n > INT32_MAX for n in numbers])
        x: Any = pointers[0]
        device = x.get_device()
        form = (device, constants, num_warps, aligned, wide, *types)
        kernel = self._known.get((form, strides))
        runtime = knobs.runtime
        if kernel is None or _calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook):
            self._by_triton(form, grid, pointers, strides, numbers, constants, num_warps)
            return
        kernel.run(
            grid[0],
            grid[1] if len(grid) > 1 else 1,
            1,
            driver.active.get_current_stream(device),
            kernel.function,
            kernel.packed_metadata,
            *(None, None, None),  # a launch's description, and the hooks that would read it
            *addresses,
            *strides,
            *numbers,
            *constants,
        )

    def _by_triton(
        self,
        form: tuple,
        grid: tuple[int, ...],
        pointers: Pointers,
        strides: tuple[int, ...],
        numbers: tuple[float, ...],
        constants: tuple,
        num_warps: int,
    ) -> None:
        """The launch of a form that may be new, or that somebody's hooks are told of."""
        key = (form, tuple(map(_seen, strides)))
        x: Any = pointers[0]
        if key not in self._forms and tracing.is_capturing(x):
            raise RuntimeError(
                f"{self.kernel.__name__} has not run in this form before, and while a CUDA graph "
                "is captured no kernel can be loaded. Run the call before, as it is captured: a "
                "capture keeps padding, so convert the model by optimize(model, packed=False) "
                "for the runs that warm up and for the capture."
            )
        ran = self.kernel[grid](*pointers, *strides, *numbers, *constants, num_warps=num_warps)
        if isinstance(ran, CompiledKernel):  # else something only looks on
            self._forms[key] = ran
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[form, strides] = ran

    def forget(self) -> None:
        self._known.clear()
        self._forms.clear()


def _calls(hook: Any) -> object:
    """The hooks that somebody wants called at each launch, a chain or one."""
    return getattr(hook, "calls", hook)


def _seen(value: int) -> object:
    """The part of an integer that Triton specialises on: 1 is a constant."""
    return value == 1 or (value % 16 == 0, -(2**31) <= value < 2**31)


def compiled() -> list[CompiledKernel]:
    """All kernels that ran so far, in each of their forms."""
    return [kernel for launch in Launch.every for kernel in launch._forms.values()]
