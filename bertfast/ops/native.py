"""The compiled modules: `_cuda` for tensors on a GPU, `_host` (the same sources) for a CPU."""

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import torch

MODULE_OF = {"cuda": "_cuda", "cpu": "_host"}
LEAST_CAPABILITY = (8, 0)
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
def unsupported_reason(device_type: str) -> str | None:
    """Why the compiled kernels can't run on this kind of device."""
    if device_type not in MODULE_OF:
        return f"the kernels run on 'cuda' and (compiled for the host) on 'cpu', not {device_type}"
    _, reason = _load(MODULE_OF[device_type])
    if reason is None and device_type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA device here"
        capability = torch.cuda.get_device_capability()
        if capability < LEAST_CAPABILITY:
            return "the kernels need compute capability 8.0, this GPU has {}.{}".format(*capability)
    return reason


def module_for(tensor: torch.Tensor) -> Any:
    return _load("_cuda" if tensor.is_cuda else "_host")[0]
