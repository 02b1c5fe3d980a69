"""Guard zones around what an op allocates, poison inside: nothing overrun, nothing unwritten."""

import contextlib
from collections.abc import Callable
from unittest import mock

import torch

_BYTES = 256
# In float32, float16 and bfloat16 alike this is a NaN, so what reads it shows in the result.
_PATTERN = 0xFF


class _Guarded:
    def __init__(self, shape, dtype, device):
        size = torch.empty((), dtype=dtype).itemsize
        count = 1
        for extent in shape:
            count *= extent
        self.buffer = torch.full(
            (2 * _BYTES + count * size,), _PATTERN, dtype=torch.uint8, device=device
        )
        inner = self.buffer[_BYTES : _BYTES + count * size]
        self.tensor = inner.view(dtype).view(shape)
        self.what = f"{dtype} {list(shape)}"

    def check(self):
        for side, zone in (
            ("before", self.buffer[:_BYTES]),
            ("after", self.buffer[-_BYTES:]),
        ):
            hit = (zone != _PATTERN).nonzero()
            if len(hit):
                raise AssertionError(
                    f"the guard zone {side} a tensor {self.what} was overwritten, "
                    f"first at byte {int(hit[0])} of {_BYTES}"
                )


@contextlib.contextmanager
def guarded_allocations():
    """While active, torch.empty and new_empty give tensors full of NaN between guard zones; checks
    them at exit.

    Yields a function that copies a tensor to a guarded one, for inputs.
    """
    guards: list[_Guarded] = []
    real_empty = torch.empty

    def empty(*shape, dtype=None, device=None, **kwargs):
        dtype = dtype or torch.get_default_dtype()
        if kwargs or not dtype.is_floating_point:
            return real_empty(*shape, dtype=dtype, device=device, **kwargs)
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = tuple(shape[0])
        with mock.patch.object(torch, "empty", real_empty):
            guard = _Guarded(shape, dtype, device)
        guards.append(guard)
        return guard.tensor

    def copy(tensor):
        guard = _Guarded(tensor.shape, tensor.dtype, tensor.device)
        guard.tensor.copy_(tensor)
        guards.append(guard)
        return guard.tensor

    def new_empty(self, *shape, dtype=None, device=None, **kwargs):
        return empty(*shape, dtype=dtype or self.dtype, device=device or self.device, **kwargs)

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
    ):
        yield copy
    for guard in guards:
        guard.check()


def run_guarded(run: Callable, inputs: dict, target: tuple[str, str]) -> dict[str, torch.Tensor]:
    """run(inputs, backend, device) with guard zones around all that it allocates and around the
    inputs that lie in one piece."""
    with guarded_allocations() as guarded:
        inputs = {
            name: guarded(value)
            if isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.is_contiguous()
            else value
            for name, value in inputs.items()
        }
        return run(inputs, *target)
