"""Launches of Triton kernels. A form of a kernel that has run before starts past Triton's binder.

At each launch the binder looks at every argument to find the form, and keeps it by a text that it
writes anew. Here the form is found by what these kernels differ in, and the kernel is started as
Triton's own `CompiledKernel` is, with addresses in place of tensors. Tensor descriptors made on the
host are handed on as they are: Triton's own launcher of the compiled kernel makes of each what the
GPU reads, with how the kernel's tile lies in shared memory, which only the compiler knows.
"""

from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import OutOfResources, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import tracing
from ..checks import INT32_MAX
from .triton_lib import INTERPRETED

Pointers = tuple[torch.Tensor | TensorDescriptor | None, ...]

# How many sizes of calls are kept for a kernel. All of one form are the same compiled kernel.
MOST_KNOWN = 4096


# Registers' worth of a thread's own memory that a strict kernel may have: Triton 3.6 keeps 8 bytes
# of zeros there, beside bulk copies on sm_120.
MOST_LOCAL = 2


class Unfit(RuntimeError):
    """The error of a kernel that, as it was compiled, can't run here, or not well."""


def describe(rows: torch.Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """A descriptor of rows, by tiles. Its own checks, of what is the same at each call, take longer
    than all the rest of a launch: here they are left out."""
    *apart, step = rows.stride()
    multiple = 16 // rows.itemsize
    if rows.data_ptr() % 16 or step != 1 or any([stride % multiple for stride in apart]):
        return TensorDescriptor.from_tensor(rows, list(block))  # says what is wrong
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = rows, rows.shape, rows.stride()
    made.block_shape, made.padding, made.round_f32_to_tf32 = list(block), "zero", False
    return made


class Launch:
    """A kernel's launches. Its parameters are, in this order: pointers or descriptors, the first of
    them never None; strides, integers on which Triton specialises; numbers, on whose values nothing
    depends; constants.

    A float's type is at its parameter, as Triton would take one that is given as an int for one.
    strict: a form that can't be compiled, or of which a thread's values don't fit into registers,
    raises Unfit.
    """

    every: list["Launch"] = []

    def __init__(self, kernel: Any, strict: bool = False) -> None:
        self.kernel = kernel
        self.strict = strict
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
        types: list[Any] = []
        addresses: list[Any] = []
        together = 0
        for pointer in pointers:
            if pointer is None:
                types.append(None)
                addresses.append(None)
            elif isinstance(pointer, TensorDescriptor):  # begins at whole 16 bytes
                types.append((pointer.base.dtype, *pointer.block_shape))
                addresses.append(pointer)
            else:
                address = pointer.data_ptr()
                types.append(pointer.dtype)
                addresses.append(address)
                together |= address
        aligned = None if together % 16 == 0 else _remainders(addresses)
        wide = None if max(numbers) <= INT32_MAX else tuple([n > INT32_MAX for n in numbers])
        device = _first(pointers).get_device()
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
        if key not in self._forms and tracing.is_capturing(_first(pointers)):
            raise RuntimeError(
                f"{self.kernel.__name__} has not run in this form before, and while a CUDA graph "
                "is captured no kernel can be loaded. Run the call before, as it is captured: a "
                "capture keeps padding, so convert the model by optimize(model, packed=False) "
                "for the runs that warm up and for the capture."
            )
        try:
            ran = self.kernel[grid](*pointers, *strides, *numbers, *constants, num_warps=num_warps)
        except OutOfResources as error:  # more threads or shared memory than a block may have
            raise Unfit(f"{self.kernel.__name__}: {error}") from error
        except RuntimeError as error:
            if self.strict and "PassManager" in str(error):  # that is how Triton's compiler fails
                raise Unfit(f"{self.kernel.__name__}: can't be compiled: {error}") from error
            raise
        if isinstance(ran, CompiledKernel):  # else something only looks on
            if self.strict and ran.n_spills > MOST_LOCAL:
                raise Unfit(f"{self.kernel.__name__}: {ran.n_spills} registers spill")
            self._forms[key] = ran
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[form, strides] = ran

    def forget(self) -> None:
        self._known.clear()
        self._forms.clear()


def _first(pointers: Pointers) -> torch.Tensor:
    first: Any = pointers[0]
    return first.base if isinstance(first, TensorDescriptor) else first


def _remainders(addresses: list[Any]) -> tuple:
    return tuple([type(a) is int and a % 16 for a in addresses])


def _calls(hook: Any) -> object:
    """The hooks that somebody wants called at each launch, a chain or one."""
    return getattr(hook, "calls", hook)


def _seen(value: int) -> object:
    """The part of an integer that Triton specialises on: 1 is a constant."""
    return value == 1 or (value % 16 == 0, -(2**31) <= value < 2**31)


def compiled() -> list[CompiledKernel]:
    """All kernels that ran so far, in each of their forms."""
    return [kernel for launch in Launch.every for kernel in launch._forms.values()]
