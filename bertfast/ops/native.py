"""The compiled modules: `_cuda` for tensors on a GPU, `_host` (the same sources) for a CPU."""

import functools
import importlib
import json
from pathlib import Path

import torch

DTYPE_TAG = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MODULE_OF = {"cuda": "_cuda", "cpu": "_host"}
LEAST_CAPABILITY = (8, 0)

# On a CPU there is no multiprocessor to count; a few blocks show every path between blocks.
HOST_MULTIPROCESSORS = 2


@functools.cache
def build_record() -> dict:
    """What setup.py wrote when it built the modules."""
    path = Path(__file__).parent.parent / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _load(name: str):
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


def module_for(tensor: torch.Tensor):
    return _load("_cuda" if tensor.is_cuda else "_host")[0]


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """The tensor's device number and torch's current stream there, as integers."""
    if not tensor.is_cuda:
        return 0, 0
    device = tensor.device.index
    return device, torch._C._cuda_getCurrentRawStream(device)


@functools.cache
def _cuda_multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(tensor: torch.Tensor) -> int:
    return _cuda_multiprocessors(tensor.device.index) if tensor.is_cuda else HOST_MULTIPROCESSORS
