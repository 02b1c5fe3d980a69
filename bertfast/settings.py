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
GRAPHS = ATTRIBUTE + "_graphs"  # where an encoder keeps its own CUDA graphs


@dataclass(frozen=True)
class Settings:
    backend: str
    keep_padding: str | None = None  # the reason; None: it is taken out
    always: bool = False  # the caller says that all that is masked is padding
    recompute: bool = False  # layers save less for the backward, and make it again there
    loss: bool = False  # a head makes its loss without logits
    vectors: bool = False  # and SPLADE's vectors, where it is asked for them

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


# The blocks of `disabled` that the thread is in, kept twice: torch hands its store on to the
# threads in which a backward runs on a device, and the other is one that a compiler can trace.
_off = threading.local()
_BLOCKS = "bertfast.disabled"
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


def _blocks() -> tuple[Any, ...]:
    if tracing.is_compiling():
        return getattr(_off, "blocks", ())
    if torch._C._is_key_in_tls(_BLOCKS):
        return torch._C._get_obj_in_tls(_BLOCKS)
    return ()


def _set_blocks(blocks: tuple[Any, ...]) -> None:
    _off.blocks = blocks
    if not tracing.is_compiling():
        torch._C._stash_obj_in_tls(_BLOCKS, blocks)


def is_disabled() -> bool:
    blocks = _blocks()
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
    """Runs the original code of converted models, in this thread and in the backward passes that it
    starts, as a context or a decorator.

        with bertfast.disabled():
            stock = model(**tokens)

    What a non-reentrant checkpoint runs again in the backward does as it did in the forward. A
    reentrant one leaves no trace of that, nor does a loss that runs the model again (GradCache):
    they go by the block that their backward is in, so have both passes in the block, or neither.
    """
    blocks = _blocks()
    _set_blocks((*blocks, _checkpoint()[0]))
    try:
        yield
    finally:
        _set_blocks(blocks)


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
