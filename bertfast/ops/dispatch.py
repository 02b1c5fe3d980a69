"""Which backend runs an op: the table that "auto" follows, and why a backend can't.

Each fast backend of an op is a module `bertfast.ops.<op>.<backend>` with `forward`, `backward` and
`unsupported_reason(device_type, dtype, ...) -> str | None`. That one text is what an explicit
`backend=` raises, what `available()` lists and what a test's skip says.
"""

import functools
import importlib

import torch

from .. import checks

BACKENDS = ("torch", "triton", "cuda")
CHOICES = ("auto", *BACKENDS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Op -> device type -> backends in the order in which "auto" tries them. A device that is not named
# runs torch. Order on "cuda": not measured yet; the compiled kernels have the lower call cost.
AUTO_ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "layer_norm": {"cuda": ("cuda", "triton", "torch"), "cpu": ("torch",)},
    "bias_gelu": {"cuda": ("cuda", "triton", "torch"), "cpu": ("torch",)},
    "attention": {"cuda": ("cuda", "triton", "torch"), "cpu": ("torch",)},
    "attention_qkv": {"cuda": ("cuda", "triton", "torch"), "cpu": ("torch",)},
}
# Ops that share another's folder, and so its backends.
_FOLDERS = {"attention_qkv": "attention"}

_modules: dict[tuple[str, str], object] = {}
_chosen: dict[tuple, str] = {}


def backend_module(op: str, backend: str):
    """The backend's module, or the text of what its import failed with."""
    key = (op, backend)
    if key not in _modules:
        name = f"bertfast.ops.{_FOLDERS.get(op, op)}.{backend}"
        try:
            _modules[key] = importlib.import_module(name)
        except ImportError as error:
            if error.name == name:  # the module itself is missing, not something that it needs
                _modules[key] = f"{op} has no {backend} kernels yet"
            else:
                _modules[key] = f"{backend} can't be imported: {error}"
    return _modules[key]


def unsupported_reason(op: str, backend: str, *case) -> str | None:
    """Why the backend can't run the op for this case (device type, dtype, ...); None if it can."""
    if backend == "torch":
        return None
    module = backend_module(op, backend)
    return module if isinstance(module, str) else module.unsupported_reason(*case)


def choose(op: str, backend: str, device_type: str, *case) -> str:
    """The backend that runs this case. An explicit one never falls back: it raises ValueError."""
    if type(backend) is not str:
        checks.check_choice("backend", backend, CHOICES)
    key = (op, backend, device_type, *case)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _choose(*key)
    return chosen


# What torch.compiler.assume_constant_result sets. Calling that would import torch._dynamo, which
# takes longer than all of torch.
choose._dynamo_marked_constant = True


def _choose(op: str, backend: str, device_type: str, *case) -> str:
    checks.check_choice("backend", backend, CHOICES)
    if backend == "auto":
        order = AUTO_ORDER[op].get(device_type, ("torch",))
        served = (b for b in order if unsupported_reason(op, b, device_type, *case) is None)
        return next(served, "torch")
    reason = unsupported_reason(op, backend, device_type, *case)
    if reason is not None:
        raise ValueError(f"backend {backend!r} can't run {op} here: {reason}")
    return backend


def available(device: torch.device | str) -> dict[str, dict[str, str | None]]:
    """For each op and backend: None if it works on this device, or the reason why not."""
    device_type = checks.check_device("device", device).type
    return {
        op: {backend: unsupported_reason(op, backend, device_type) for backend in BACKENDS}
        for op in AUTO_ORDER
    }


def autocast_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype of torch's layer_norm of the tensors' sum under autocast: float32 on CUDA; a CPU's
    autocast leaves layer_norm alone, so there it is the sum's."""
    present = [tensor for tensor in tensors if tensor is not None]
    if present[0].is_cuda:
        return torch.float32
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in present))
