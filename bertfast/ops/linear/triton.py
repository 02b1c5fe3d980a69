"""y = gelu(u + bias), u = x weight^T; dv = (dy weight) * gelu'(u + bias), dbias = sums of dv.

Saved for the backward: u, the product rounded to its dtype, without its bias; y is the GELU of that
rounded u. x (M, K), weight (N, K), y and u (M, N); in the backward dy (M, K), weight (K, N), u and
dv (M, N). Any K and N that are multiples of 8.

A tile of the output belongs to one program. It adds up the products, BLOCK_K terms at a time, and
does the rest while the sums are in registers, by the functions of bias_gelu's kernels: y has the
bits that those would give for the saved u. Tiles and their forms: config.py. A tile's columns of dv
are summed in float32 before dv is rounded, into one row of partial sums for each row of tiles, and
a finishing kernel adds those in a fixed order: no atomics, the same bits each run.

Moves, in values: in the forward M K + N K + M N, and M N more for u; in the backward M K + N K +
2 M N. A product and a GELU of its own move 2 M N more; in a forward that saves u, M N more. Tiles
read their operands again from the second-level cache: for each element of the output
K (1 / BLOCK_M + 1 / BLOCK_N) values.
"""

import functools
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import triton_lib
from ..pointers import dense
from ..triton_column_sum import column_sums
from ..triton_launch import Launch, describe
from . import limits
from .config import Config, architecture, choose
from .triton_descriptors import linear_act_tma_backward_kernel, linear_act_tma_kernel
from .triton_pointers import linear_act_backward_kernel, linear_act_kernel


def unsupported_reason(device: str | torch.device, *case: Any) -> str | None:
    """case: as in limits.py."""
    return triton_lib.unsupported_reason(device) or limits.unsupported_reason(*case)


_class_of = functools.cache(architecture)
_by_pointers = Launch(linear_act_kernel, strict=True)
_by_pointers_backward = Launch(linear_act_backward_kernel, strict=True)
_by_descriptors = Launch(linear_act_tma_kernel, strict=True)
_by_descriptors_backward = Launch(linear_act_tma_backward_kernel, strict=True)


class Activation(NamedTuple):
    """The epilogue of a product."""

    name: str  # as gated's are named
    halves: int = 1  # 2 where it is gated: of u, its gradient, the bias, and the forward's weight

    def pass_(self, name: str) -> str:
        """Its name in config.py."""
        return f"gated {name}" if self.halves == 2 else name


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    y: torch.Tensor,
    u: torch.Tensor | None,
) -> None:
    """Fills y, and u if it is given."""
    activate(x, weight, bias, Activation("gelu_tanh" if tanh else "gelu"), y, u)


def activate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
    y: torch.Tensor,
    u: torch.Tensor | None,
) -> None:
    """Fills y, and u if it is given, of any activation."""
    call = _Call(activation.pass_("forward" if u is None else "saving"), x, y)
    with triton_lib.on_device(x):
        if call.config.form == "pointers":
            call.launch(
                _by_pointers,
                (x, weight, dense(bias), dense(y), dense(u)),
                (_eighths(x), _eighths(weight)),
                (*activation, call.inputs % call.config.block_k == 0),
            )
        else:
            config = call.config
            descriptors = (
                _tiles(x, config.block_m, config.block_k),
                _tiles(weight, config.block_n, config.block_k, activation.halves),
                call.parts(y),
                None if u is None else call.parts(u, activation.halves),
            )
            call.launch_descriptors(_by_descriptors, (*descriptors, dense(bias)), activation)


def backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    tanh: bool,
    dv: torch.Tensor,
    dbias: torch.Tensor | None,
) -> None:
    """Fills dv, and dbias if it is given."""
    derive(dy, weight, u, bias, Activation("gelu_tanh" if tanh else "gelu"), dv, dbias)


def derive(
    dy: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
    du: torch.Tensor,
    dbias: torch.Tensor | None,
) -> None:
    """Fills du, the gradient of u + bias, and dbias if it is given, of any activation."""
    call = _Call(activation.pass_("backward"), dy, weight)
    partial = None
    if dbias is not None:
        shape = (1, call.row_tiles, du.shape[1])
        partial = torch.empty(shape, dtype=torch.float32, device=du.device)
    with triton_lib.on_device(dy):
        if call.config.form == "pointers":
            call.launch(
                _by_pointers_backward,
                (dy, weight, dense(u), dense(bias), dense(du), partial),
                (_eighths(dy), _eighths(weight)),
                (*activation, call.inputs % call.config.block_k == 0),
            )
        else:
            config = call.config
            operands = (
                _tiles(dy, config.block_m, config.block_k),
                _tiles(weight, config.block_k, config.block_n),
            )
            by_address = config.form == "operands"
            whole: tuple = (dense(u), dense(du))
            if not by_address:
                whole = tuple(call.parts(matrix, activation.halves) for matrix in (u, du))
            pointers = (*operands, *whole, dense(bias), partial)
            constants = (*activation, by_address)
            call.launch_descriptors(_by_descriptors_backward, pointers, constants)
        if dbias is not None and partial is not None:
            column_sums(partial, [dbias])


class _Call:
    """A product's sizes, and the tiles that serve it."""

    def __init__(self, pass_: str, a: torch.Tensor, wide: torch.Tensor) -> None:
        """wide: a matrix as wide as y, or as the gradient of y."""
        self.rows, self.inputs = a.shape
        self.outputs = wide.shape[1]
        arch = _class_of(triton_lib.capability(a))
        sizes = (self.inputs, self.outputs, limits.rows_class(self.rows))
        self.device = a.device if a.is_cuda else None
        self.config: Config = choose(pass_, arch, *sizes, self.device)
        self.row_tiles = -(-self.rows // self.config.block_m)
        self.tiles = self.row_tiles * -(-self.outputs // self.config.block_n)

    @property
    def block(self) -> tuple[int, int, int, int, int]:
        config = self.config
        size = (config.block_m, config.block_n, config.block_k)
        return (*size, config.num_stages, config.parts)

    def parts(self, matrix: torch.Tensor, halves: int = 1) -> TensorDescriptor:
        """Of a dense matrix of the output's size, or one of two halves, by what the epilogue takes
        at once."""
        rows, columns = self.config.block_m, self.config.block_n // self.config.parts
        if halves == 1:
            return describe(dense(matrix), (rows, columns))
        return describe(dense(matrix).view(-1, halves, self.outputs), (rows, 1, columns))

    def launch(
        self, kernel: Launch, pointers: tuple, strides: tuple[int, int], constants: tuple
    ) -> None:
        numbers = (self.rows, self.outputs // 8, self.inputs // 8, *strides)
        warps = self.config.num_warps
        kernel((self.tiles,), pointers, (), numbers, (*constants, *self.block), warps)

    def launch_descriptors(self, kernel: Launch, pointers: tuple, constants: tuple) -> None:
        programs, specialize = self.tiles, self.config.form == "specialized"
        walk = specialize or self.config.form == "persistent"
        if walk:
            programs = min(programs, multiprocessors(self.device))
        numbers = (self.rows, self.outputs // 8, self.inputs // 8, programs)
        constants = (*constants, walk, specialize, *self.block)
        kernel((programs,), pointers, (), numbers, constants, self.config.num_warps)


# Those of the GPU that a capability without a device stands for.
MULTIPROCESSORS = 132


def multiprocessors(device: torch.device | None) -> int:
    return MULTIPROCESSORS if device is None else _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _eighths(rows: torch.Tensor) -> int:
    """From one row to the next, in units of 8 elements."""
    return _checked(rows).stride(0) // 8


def _tiles(
    rows: torch.Tensor, block_rows: int, block_columns: int, halves: int = 1
) -> TensorDescriptor:
    """halves: a tile has the same rows of each."""
    rows = _checked(rows)
    if rows.stride(0) < rows.shape[1]:  # rows that share memory
        rows = rows.contiguous()
    if halves > 1:
        rows = rows.unflatten(0, (halves, -1))
        return describe(rows, (halves, block_rows, block_columns))
    return describe(rows, (block_rows, block_columns))


def _checked(rows: torch.Tensor) -> torch.Tensor:
    if rows.stride(1) != 1 or rows.stride(0) % 8:
        raise AssertionError(
            "a kernel reads this tensor as rows apart by multiples of 16 bytes; "
            f"it has shape {list(rows.shape)} and strides {list(rows.stride())}"
        )
    return rows
