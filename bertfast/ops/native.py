"""The compiled modules: `_cuda` for tensors on a GPU, `_host` (the same sources) for a CPU."""

import functools
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import gpu

MODULE_OF = {"cuda": "_cuda", "cpu": "_host"}
# By it the modules read tensors; torch has it from 2.10 on.
_DLPACK = "__dlpack_c_exchange_api__"


@functools.cache
def build_record() -> dict:
    """The record that setup.py wrote when it built the modules."""
    path = Path(__file__).parent.parent / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _load(name: str) -> tuple[Any, str | None]:
    """The module, or the reason why it isn't there."""
    if not hasattr(torch.Tensor, _DLPACK):
        return None, (
            f"bertfast.{name} reads tensors by DLPack's C exchange interface "
            f"(torch.Tensor.{_DLPACK}), which torch {torch.__version__} doesn't have"
        )
    try:
        return importlib.import_module(f"bertfast.{name}"), None
    except ImportError as error:
        reason = build_record().get(name) or str(error)
        return None, f"bertfast.{name} is not there: {reason}"


@functools.cache
def unsupported_reason(device: str | torch.device) -> str | None:
    """Why the compiled kernels can't run on this device; of a GPU without a number, the current."""
    where = torch.device(device)
    if where.type not in MODULE_OF:
        return f"the kernels run on 'cuda' and (compiled for the host) on 'cpu', not {where.type}"
    module, reason = _load(MODULE_OF[where.type])
    if reason is not None or where.type == "cpu":
        return reason
    return gpu.unsupported_reason(where) or _why_not_loaded(module, where)


class Probe(NamedTuple):
    """CUDA's answer to loading one of the module's kernels for a device."""

    error: str | None  # CUDA's name of it
    driver: int  # the newest CUDA that the driver serves: 12040 is 12.4
    runtime: int  # the CUDA that the module was built with


def probe(module: Any, index: int) -> Probe | None:
    """None for the host's build, which needs no driver."""
    return Probe(*module.probe(index)) if hasattr(module, "probe") else None


def _why_not_loaded(module: Any, device: torch.device) -> str | None:
    index = torch.cuda.current_device() if device.index is None else device.index
    found = probe(module, index)
    if found is None or found.error is None:
        return None
    if found.error in ("cudaErrorInsufficientDriver", "cudaErrorUnsupportedPtxVersion"):
        return (
            f"the GPU's driver serves CUDA {_version(found.driver)}, and the kernels were built "
            f"with CUDA {_version(found.runtime)}: a newer driver or an older toolkit is needed"
        )
    if found.error in ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction"):
        major, minor = torch.cuda.get_device_capability(index)
        archs = ", ".join(build_record().get("architectures") or ["others"])
        return f"the kernels were compiled for {archs}, and this GPU is sm_{major}{minor}"
    return f"CUDA can't load the kernels: {found.error}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def module_for(tensor: torch.Tensor) -> Any:
    return _load("_cuda" if tensor.is_cuda else "_host")[0]
