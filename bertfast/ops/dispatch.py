"""Which backend runs an op: the table that "auto" follows, and why a backend can't.

Each fast backend of an op is a module `bertfast.ops.<op>.<backend>` with `forward`, `backward` and
`unsupported_reason(device_type, dtype, ...) -> str | None`. That one text is what an explicit
`backend=` raises, what `available()` lists and what a test's skip says.
"""

import importlib

import torch

BACKENDS = ("torch", "triton", "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Op -> device type -> backends in the order in which "auto" tries them. A device that is not named
# runs torch. Order on "cuda": not measured yet; the compiled kernels have the lower call cost.
AUTO_ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "layer_norm": {"cuda": ("cuda", "triton", "torch"), "cpu": ("torch",)},
}

_modules: dict[tuple[str, str], object] = {}
_chosen: dict[tuple, str] = {}


def backend_module(op: str, backend: str):
    """The backend's module, or the text of what its import failed with."""
    key = (op, backend)
    if key not in _modules:
        try:
            _modules[key] = importlib.import_module(f"bertfast.ops.{op}.{backend}")
        except ImportError as error:
            _modules[key] = f"{backend} can't be imported: {error}"
    return _modules[key]


def unsupported_reason(op: str, backend: str, *case) -> str | None:
    """Why the backend can't run the op for this case (device type, dtype, ...); None if it can."""
    if backend == "torch":
        return None
    module = backend_module(op, backend)
    return module if isinstance(module, str) else module.unsupported_reason(*case)


@torch.compiler.assume_constant_result
def choose(op: str, backend: str, device_type: str, *case) -> str:
    """The backend that runs this case. An explicit one never falls back: it raises ValueError."""
    key = (op, backend, device_type, *case)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _choose(*key)
    return chosen


def _choose(op: str, backend: str, device_type: str, *case) -> str:
    if backend == "auto":
        order = AUTO_ORDER[op].get(device_type, ("torch",))
        return next(b for b in order if unsupported_reason(op, b, device_type, *case) is None)
    if backend not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
    reason = unsupported_reason(op, backend, device_type, *case)
    if reason is not None:
        raise ValueError(f"backend {backend!r} can't run {op} here: {reason}")
    return backend


def available(device: torch.device | str) -> dict[str, dict[str, str | None]]:
    """For each op and backend: None if it works on this device, or the reason why not."""
    device_type = torch.device(device).type
    return {
        op: {backend: unsupported_reason(op, backend, device_type) for backend in BACKENDS}
        for op in AUTO_ORDER
    }


def in_functorch_transform() -> bool:
    """Whether vmap, grad, jvp, ... is active: there only the torch reference can run."""
    return torch._C._functorch.maybe_current_level() is not None
