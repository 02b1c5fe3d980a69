"""The settings of a converted module, and the switch that turns bertfast off."""

import contextlib
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import tracing

ATTRIBUTE = "_bertfast"  # a converted module's Settings
KEPT = ATTRIBUTE + "_kept"  # why its last batch with padding kept it, for reports


@dataclass(frozen=True)
class Settings:
    backend: str
    keep_padding: str | None = None  # the reason; None: it is taken out
    always: bool = False  # the caller says that all that is masked is padding
    recompute: bool = False  # layers save less for the backward, and make it again there

    @property
    def packed(self) -> bool:
        return self.keep_padding is None


def is_swapped(module: nn.Module) -> bool:
    """True for a module whose class is one that `optimize` puts in another's place."""
    return hasattr(type(module), "_original")


def is_converted(module: nn.Module) -> bool:
    """True where `optimize` has been. A swapped class alone doesn't say so: `type(model)(config)`
    makes an instance of it, which runs its original code until it is optimized."""
    return ATTRIBUTE in module.__dict__ and is_swapped(module)


_off = threading.local()
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


def is_disabled() -> bool:
    blocks = getattr(_off, "blocks", ())
    frame, again = _checkpoint()
    if frame is None or frame in blocks:
        return bool(blocks)
    # Around the checkpoint: the second time goes by the first, whichever thread it is in and
    # whatever block the backward is in.
    if blocks and not again:
        frame.bertfast_disabled = True
    return hasattr(frame, "bertfast_disabled") if again else bool(blocks)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Runs the original code of converted models, in this thread, as a context or a decorator.

        with bertfast.disabled():
            stock = model(**tokens)

    What a non-reentrant checkpoint runs again in the backward does as it did in the forward. A
    reentrant one leaves no trace of that: it goes by the block and the thread that its backward
    is in, which on a GPU is torch's own, and may draw other dropout than its forward did.
    """
    blocks = getattr(_off, "blocks", ())
    _off.blocks = (*blocks, _checkpoint()[0])
    try:
        yield
    finally:
        _off.blocks = blocks


def _checkpoint() -> tuple[Any, bool]:
    """torch's record of the innermost non-reentrant checkpoint whose function runs now, which is
    the same when it is run again, and whether it is. None where there is no checkpoint, or where
    another hook for saved tensors or another version of torch hides it."""
    hooks = None if tracing.is_compiling() else _top_hooks(False)
    if hooks is None:
        return None, False
    pack = inspect.unwrap(hooks[0])
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None, False
    cells = inspect.getclosurevars(pack).nonlocals
    if "target_frame_ref" in cells:
        return cells["target_frame_ref"](), True
    return cells.get("frame"), False
