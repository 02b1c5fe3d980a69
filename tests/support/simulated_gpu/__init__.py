"""A simulated GPU: two "cuda" devices of host memory, so that the code behind `is_cuda` runs, with
numbers.

`start()` has to come before anything imports torch, so its tests run in a process of their own:
`tests/test_simulated_gpu.py` starts one, and `BERTFAST_SIMULATED_GPU=1 pytest ...` runs any test.
"""

import atexit
import ctypes
import os
import sys
import time

from .build import library, why_not

__all__ = ["SWITCH", "start", "wanted", "why_not"]

SWITCH = "BERTFAST_SIMULATED_GPU"


def wanted() -> bool:
    return os.environ.get(SWITCH) == "1"


def start() -> None:
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the simulated GPU, which it then can't see")
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    path = str(library())
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_INTERPRET"] = "1"
    from . import cuda

    cuda.install(path)
    # autograd's threads for the devices let go of the last graph, for which they need the GIL,
    # before Python ends.
    atexit.register(time.sleep, 0.05)


def install_kernels() -> None:
    from . import kernels

    kernels.install()
