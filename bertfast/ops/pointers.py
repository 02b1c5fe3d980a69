"""Checks of the strides that Triton kernels assume.

A kernel reads memory by an address and can't see a tensor's strides. So each tensor that is handed
to one passes through a function here, which looks at the strides first and raises where the memory
isn't what the kernel takes it for. The caller makes tensors dense before. The compiled
modules do the same in csrc/bindings/tensor.cpp.
"""

from typing import NoReturn, TypeVar

import torch

MaybeTensor = TypeVar("MaybeTensor", torch.Tensor, torch.Tensor | None)


def _refuse(tensor: torch.Tensor, what: str) -> NoReturn:
    raise AssertionError(
        f"a kernel reads this tensor as {what}; "
        f"it has shape {list(tensor.shape)} and strides {list(tensor.stride())}"
    )


def dense(tensor: MaybeTensor) -> MaybeTensor:
    """The tensor, of which a kernel is told nothing but where it begins."""
    if tensor is not None and not tensor.is_contiguous():
        _refuse(tensor, "dense")
    return tensor


def row_stride(rows: torch.Tensor | None, width: int) -> int:
    """From one row to the next, in elements, for what `as_rows` returns."""
    if rows is None or rows.is_contiguous():
        return width
    if rows.dim() != 2 or (rows.stride(1) != 1 and width != 1):
        _refuse(rows, "dense rows")
    return rows.stride(0)


def head_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of batch (0 if packed), token and head. A head's elements are neighbours."""
    *strides, step = x.stride()
    if step != 1 and x.shape[-1] != 1:
        _refuse(x, "dense in its last dimension")
    batch, token, head = strides if len(strides) == 3 else (0, *strides)
    return batch, token, head


def shared_head_strides(*tensors: torch.Tensor) -> tuple[int, int, int]:
    """Of tensors whose strides a kernel is told once."""
    for x in tensors:
        if x.stride() != tensors[0].stride():
            _refuse(x, f"one with strides {list(tensors[0].stride())}")
    return head_strides(tensors[0])
