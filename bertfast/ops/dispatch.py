"""The choice of an op's backend: the table that "auto" follows, and why a backend can't run.

Each fast backend of an op is a module `bertfast.ops.<op>.<backend>` with `forward`, `backward` and
`unsupported_reason(device, dtype, ...) -> str | None`. That one text is what an explicit
`backend=` raises, what `available()` lists and what a test's skip says.
"""

import functools
import importlib
import importlib.util
import pkgutil
from typing import Any

import torch

from .. import checks
from . import tuned

BACKENDS = ("torch", "triton", "cuda")
CHOICES = ("auto", *BACKENDS)

# The order in which "auto" tries the backends on a kind of device, after what was measured on this
# one; on others it is torch. Not measured yet; the compiled kernels have the lower call cost. An op
# may have a table of its own, by architecture and shape: `order.py` in its folder.
AUTO_ORDER: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton", "torch")}

_modules: dict[tuple[str, str], Any] = {}
_chosen: dict[tuple, str] = {}
tuned.depending.append(_chosen.clear)


@functools.cache
def ops() -> dict[str, str]:
    """Each op that has kernels, by its name, and the folder in which they are: `bertfast.ops.*`
    with a reference, whose `__all__` names what it serves."""
    package = importlib.import_module(__package__)
    found = {}
    for folder in pkgutil.iter_modules(package.__path__):
        name = f"{__package__}.{folder.name}"
        if folder.ispkg and importlib.util.find_spec(f"{name}.reference"):
            served = importlib.import_module(name).__all__
            found.update(dict.fromkeys(served, folder.name))
    return found


def backend_module(op: str, backend: str) -> Any:
    """The backend's module, or the text of the error of its import."""
    key = (op, backend)
    if key not in _modules:
        name = f"{__package__}.{ops()[op]}.{backend}"
        try:
            _modules[key] = importlib.import_module(name)
        except ImportError as error:
            if error.name == name:  # the module itself is missing, not something that it needs
                _modules[key] = f"{op} has no {backend} kernels yet"
            else:
                _modules[key] = f"{backend} can't be imported: {error}"
    return _modules[key]


def unsupported_reason(op: str, backend: str, *case: Any) -> str | None:
    """Why the backend can't run the op for this case (device, dtype, ...); None if it can."""
    if backend == "torch":
        return None
    module = backend_module(op, backend)
    return module if isinstance(module, str) else module.unsupported_reason(*case)


def choose(op: str, backend: str, device: torch.device, *case: Any) -> str:
    """The backend that runs this case. An explicit one never falls back: it raises ValueError."""
    if type(backend) is not str:
        checks.check_choice("backend", backend, CHOICES)
    key = (op, backend, device, *case)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _choose(*key)
    return chosen


# What torch.compiler.assume_constant_result sets. Calling that would import torch._dynamo, which
# takes longer than all of torch.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(op: str, backend: str, device: torch.device, *case: Any) -> str:
    checks.check_choice("backend", backend, CHOICES)
    if backend == "auto":
        order = _order(op, torch.device(device), case)
        served = (b for b in order if unsupported_reason(op, b, device, *case) is None)
        return next(served, "torch")
    reason = unsupported_reason(op, backend, device, *case)
    if reason is not None:
        raise ValueError(f"backend {backend!r} can't run {op} here: {reason}")
    return backend


def shipped_order(op: str, device: torch.device, case: tuple = ()) -> tuple[str, ...]:
    """The backends in the order in which "auto" tries them where nothing was measured."""
    table = _table(ops()[op]) if device.type == "cuda" else None
    if table is not None:
        return table.order(device, *case)
    return AUTO_ORDER.get(device.type, ("torch",))


def _order(op: str, device: torch.device, case: tuple) -> tuple[str, ...]:
    """The backends in the order in which "auto" tries them."""
    order = shipped_order(op, device, case)
    if device.type != "cuda":
        return order
    measured = tuned.current(device).backends.get(tuned.key(ops()[op], *case))
    return order if measured is None else (measured.chosen, *order)


@functools.cache
def _table(folder: str) -> Any:
    """The module with the table of an op's folder, if it has one."""
    name = f"{__package__}.{folder}.order"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def available(device: torch.device | str) -> dict[str, dict[str, str | None]]:
    """For each op and backend: None if it works on this device, or the reason why not."""
    device = checks.check_device("device", device)
    return {
        op: {backend: unsupported_reason(op, backend, device) for backend in BACKENDS}
        for op in ops()
    }


def autocast_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype of torch's layer_norm of the tensors' sum under autocast: float32 on CUDA; a CPU's
    autocast leaves layer_norm alone, so there it is the sum's."""
    present = [tensor for tensor in tensors if tensor is not None]
    if present[0].is_cuda:
        return torch.float32
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in present))
