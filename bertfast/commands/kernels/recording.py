"""Launches recorded: the arguments that launchers hand to Triton, noted and not launched.

A launch takes its ordinary way through Triton up to where the kernel would be compiled. So what is
noted is what a launch specialises on, by Triton's own rules.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from ...ops import triton_lib
from ...ops.aot import Launch


def aim_at(capability: int) -> None:
    """From now on launchers and Triton see a GPU of this compute capability."""
    triton_lib.capability_without_device.set(capability)
    stand_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(stand_in)


def record(call: Callable[[], None], note: Callable[[Launch], None], device: str = "meta") -> None:
    """Calls launchers, and notes each launch. device: where the tensors that they make lie."""
    run = JITFunction.run

    def run_until_compiled(kernel: JITFunction, *args: object, **kwargs: object) -> None:
        given = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        bound = kernel.signature.bind(*args, **given)
        bound.apply_defaults()

        def take(*, compile: dict, **_: object) -> bool:
            threads = 32 * compile["num_warps"]
            note(Launch(kernel, bound.arguments, threads, compile["specialization_data"]))
            return True  # Triton does no more for this launch

        kernel.device_caches.clear()  # for what is there Triton would not ask
        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = take
            run(kernel, *args, **kwargs)

    JITFunction.run = run_until_compiled
    try:
        with torch.device(device):
            call()
    finally:
        JITFunction.run = run


def compiled(launch: Launch) -> CompiledKernel:
    """Triton's compiled kernel, with its cubin in asm["cubin"]."""
    return launch.kernel.preload(launch.specialization)
