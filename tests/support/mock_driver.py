"""A Triton driver without a GPU: the real JIT, whose kernels are launched into nothing.

For a process of its own in which Triton's interpreter is off. The launchers' tensors lie on the
CPU. What Triton compiles, what it would load into a GPU and what it starts is recorded, and with
each of these whether a CUDA graph's capture was going on, of which `capturing` is the switch.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
import triton.compiler
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver

from bertfast import tracing
from bertfast.ops import dispatch, triton_lib
from bertfast.ops.triton_launch import Launch

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have


class Compiled(NamedTuple):
    name: str
    form: str  # Triton's key of it
    capturing: bool


class Driver(nvidia.CudaDriver):
    """Stands where Triton's driver does; all that reaches it from a kernel ends here."""

    def __init__(self, capability: int, recording: bool) -> None:
        self.capability = capability
        self.capturing = False
        self.compiled: list[Compiled] = []
        self.loaded: list[tuple[str, bool]] = []
        self.started: list[tuple] = []  # each launch's kernel, form, grid and numbers
        self.told: list[bool] = []  # whether it was Triton's own, which hooks are told of
        self.described: list[tuple] = []  # what each descriptor's map was made of, but its address
        # Registers and spilled bytes of each kernel that is loaded, and its most threads.
        self.loads = (32, 0, 1024)
        self.shared_memory = SHARED_MEMORY[capability]
        self.utils = SimpleNamespace(
            load_binary=self._load,
            fill_tma_descriptor=self._describe,  # of Triton 3.6
            fill_tma_descriptor_tiled=self._describe,
            launch=_nothing,
            build_signature_metadata=lambda signature: b"",
            get_device_properties=lambda device: dict(max_shared_mem=self.shared_memory),
        )
        self.launcher_cls = self._launcher if recording else nvidia.CudaLauncher
        self.get_device_capability = lambda device: divmod(capability, 10)
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def _load(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spilled bytes, and the threads that a block may have."""
        self.loaded.append((name, self.capturing))
        return 1, 1, *self.loads

    def _describe(self, address: int, *how: Any) -> str:
        self.described.append(how)
        return "a map"

    def _launcher(self, source: Any, metadata: Any) -> Any:
        """Triton's own launcher of a kernel, which ends in `utils.launch`."""
        launch = nvidia.CudaLauncher(source, metadata)
        types = tuple(source.signature.values())
        neither = ("*", "tensordesc", "constexpr")
        numbers = [i for i, kind in enumerate(types) if not kind.startswith(neither)]
        constants = tuple(sorted((*source.constants.items(), *source.attrs.items()), key=repr))
        form = (source.fn.__name__, types, repr(constants))

        def noted(*arguments: Any) -> None:
            launch(*arguments)
            *grid, _, _, _, _, _, _ = arguments[:9]
            given = arguments[9:]
            self.started.append((form, grid, [given[i] for i in numbers]))
            self.told.append(arguments[7] is not None)

        return noted

    def note_compilation(self, *, key: str, fn: Any, **_: Any) -> None:
        name = fn.name.rpartition(".")[2]
        self.compiled.append(Compiled(name, key, self.capturing))

    def inside_a_capture(self) -> list[str]:
        """Names of kernels that were compiled or loaded where CUDA would have refused it."""
        compiled = [each.name for each in self.compiled if each.capturing]
        return compiled + [name for name, capturing in self.loaded if capturing]


class Uncompiled(CompiledKernel):
    """A stand-in for a kernel where only the number of forms counts, and compiling takes long."""

    def __init__(self, source: Any, *_: Any, **__: Any) -> None:
        self.src = source
        self.name = source.fn.__name__
        scratch = [
            f"{kind}_scratch_{what}" for kind in ("global", "profile") for what in ("size", "align")
        ]
        self.metadata = SimpleNamespace(
            **dict.fromkeys((*scratch, "shared", "tmem_size"), 0),
            **dict(num_warps=4, num_ctas=1, launch_cooperative_grid=False, launch_pdl=False),
        )
        self.packed_metadata = (4, 1, 0)
        self.kernel, self.metadata_group, self.hash = b"", {}, ""
        self.module = self.function = self._run = None


def _nothing(*_: Any) -> None:
    pass


@contextlib.contextmanager
def mocked(capability: int, compiling: bool = True, recording: bool = True) -> Iterator[Driver]:
    """Launches of Triton kernels go to a driver of this compute capability, which is yielded.

    compiling: whether kernels are compiled, which takes seconds for each. recording: whether
    launches are noted, which takes some microseconds for each.
    """
    if triton_lib.INTERPRETED:
        raise RuntimeError("the mock driver needs a process without TRITON_INTERPRET")
    made = Driver(capability, recording)
    capable = triton_lib.capability_without_device.set(capability)
    forget()
    with contextlib.ExitStack() as stack:
        patch = lambda *arguments, **options: stack.enter_context(  # noqa: E731
            mock.patch.object(*arguments, **options)
        )
        patch(driver, "_active", made)
        patch(dispatch, "_chosen", {})
        patch(triton_lib, "unsupported_reason", lambda *_: None)
        patch(tracing, "is_capturing", lambda tensor: made.capturing)
        # What Triton's launcher takes of its C code; 3.6 compiles some for each kernel.
        patch(nvidia, "PyKernelArg", lambda **parts: parts, create=True)
        patch(nvidia, "ARG_KERNEL", 0, create=True)
        patch(nvidia, "ARG_CONSTEXPR", 1, create=True)
        patch(nvidia, "library_dirs", list)
        patch(nvidia, "compile_module_from_src", lambda **_: SimpleNamespace(launch=_nothing))
        if not compiling:
            patch(triton.compiler, "compile", Uncompiled)
        stack.enter_context(knobs.runtime.scope())
        knobs.runtime.jit_cache_hook = made.note_compilation
        try:
            yield made
        finally:
            triton_lib.capability_without_device.reset(capable)
            forget()


def forget() -> None:
    """The next launch of any kernel is its first."""
    triton.compiler.compiler.max_shared_mem.cache_clear()
    for launch in Launch.every:
        launch.forget()
        launch.kernel.device_caches.clear()
