"""Rows of the backward of layer_norm and bias_gelu, as they are split over programs: enough warps
for a large GPU, few partial sums, and by the rows alone, as a program's rows are one sum."""

import pytest
import torch

from bertfast.ops import dropout
from bertfast.ops.layer_norm.run import Gradients, Saved
from bertfast.ops.rows import chain
from bertfast.testing import bias_gelu as gelu_table
from bertfast.testing import hold_to_budget
from bertfast.testing import layer_norm as norm_table

MULTIPROCESSORS = 132  # of an H100, the fewest of the GPUs that need many warps
ROWS = (1024, 4096, 16384, 131072)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])

# width -> programs at these rows, in float16.
NORM_TRITON = {384: (128, 256, 256, 512), 768: (256, 256, 256, 1024), 1024: (256, 256, 256, 1024)}
NORM_CUDA = {384: (128, 256, 342, 745), 768: (256, 342, 373, 1130), 1024: (256, 342, 373, 2260)}
# width -> threads that walk down the rows side by side.
GELU_CUDA = {1536: (512, 512, 512, 4096), 3072: (256, 256, 512, 4096), 4096: (171, 187, 586, 4096)}


def rows_of(rows: int, width: int) -> torch.Tensor:
    return torch.empty(1, width, dtype=torch.float16).expand(rows, width)


def all_gradients(dy: torch.Tensor) -> Gradients:
    return Gradients(dy, None, *[torch.empty(dy.shape[1], dtype=dy.dtype, device=dy.device)] * 3)


def fills_a_gpu(rows: int, programs: int, warps: int) -> bool:
    """Seven warps or more on each multiprocessor, where the rows are enough for that; and the three
    parameters' partial sums, written and read, are less than a third of what the rows move."""
    if rows < 4096:
        return programs * warps >= rows / 2
    moved, of_partials = rows * 4 * 2, programs * 3 * 2 * 4
    return programs * warps >= 7 * MULTIPROCESSORS and of_partials < moved / 3


@pytest.mark.triton
@pytest.mark.parametrize("width", NORM_TRITON)
def test_programs_of_layer_norm_in_triton(width, monkeypatch):
    triton = pytest.importorskip("bertfast.ops.layer_norm.triton")
    launched = []
    monkeypatch.setattr(triton, "_backward", lambda grid, *rest: launched.append((grid, rest[-1])))
    monkeypatch.setattr(triton, "column_sums", lambda *_: None)
    for rows in ROWS:
        dy = torch.empty(rows, width, dtype=torch.float16, device="meta")
        stats = torch.empty(rows, device="meta")
        drop = dropout.NO_DROPOUT
        triton.backward(dy, None, Saved(dy, stats, stats), dy[0], drop, all_gradients(dy))
    assert tuple(grid[0] for grid, _ in launched) == NORM_TRITON[width]
    for rows, (grid, warps) in zip(ROWS, launched, strict=True):
        assert fills_a_gpu(rows, grid[0], warps), rows


@pytest.mark.host
@pytest.mark.parametrize("width", NORM_CUDA)
def test_blocks_of_layer_norm_in_cuda(width, host_runtime):
    blocks = []
    for rows in ROWS:
        dy = rows_of(rows, width)
        shape = host_runtime.layer_norm_partial_shape(dy, all_gradients(dy))
        assert shape == (3, shape[1], width)
        assert fills_a_gpu(rows, shape[1], 4), rows
        blocks.append(shape[1])
    assert tuple(blocks) == NORM_CUDA[width]


@pytest.mark.host
@pytest.mark.parametrize("width", GELU_CUDA)
def test_chains_of_bias_gelu_in_cuda(width, host_runtime):
    shapes = [host_runtime.bias_gelu_partial_shape(rows_of(rows, width)) for rows in ROWS]
    assert shapes == [(chains, width) for chains in GELU_CUDA[width]]
    for rows, (chains, _) in zip(ROWS, shapes, strict=True):
        assert chains * (width // 8) >= min(512 * MULTIPROCESSORS, rows / 2 * (width // 8))


@pytest.mark.parametrize("longest", [1, 16, 32])
@pytest.mark.parametrize("side_by_side", [1, 256, 384])
def test_chains_are_short_and_their_programs_come_in_full_rounds(side_by_side, longest):
    for groups in (1, 2, 255, 256, 257, 1000, 12288, 12289, 10**6, 2**30):
        of_each = chain(groups, side_by_side, longest)
        programs = -(-groups // of_each)
        rounds = -(-groups // (side_by_side * longest))
        assert 1 <= of_each <= longest
        assert programs <= side_by_side * rounds
        # One fewer would not do.
        assert of_each == 1 or -(-groups // (of_each - 1)) > side_by_side * rounds


# As long as chains get, which few rows don't show.


@pytest.mark.host
@dtypes
def test_longest_chains_of_layer_norm_in_cuda(dtype, host_runtime, monkeypatch):
    at_a_time, longest = (8, 32) if dtype == torch.float16 else (4, 32)  # rows of a block
    shape = (3, 2, 384)
    monkeypatch.setattr(host_runtime, "layer_norm_partial_shape", lambda dy, grads: shape)
    inputs = norm_table.make_inputs(norm_table.Case((2 * at_a_time * longest, 384)), dtype)
    hold_to_budget(norm_table, inputs, norm_table.run(inputs, "cuda"))


@pytest.mark.triton
@dtypes
def test_longest_chains_of_layer_norm_in_triton(dtype, monkeypatch):
    triton = pytest.importorskip("bertfast.ops.layer_norm.triton")
    monkeypatch.setattr(triton, "PROGRAMS", 1)
    rows = triton.backward_config(384, dtype.itemsize).rows * triton.LONGEST_CHAIN
    inputs = norm_table.make_inputs(norm_table.Case((rows, 384)), dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hold_to_budget(norm_table, inputs, norm_table.run(inputs, "triton", device))


@pytest.mark.host
@dtypes
def test_longest_chains_of_bias_gelu_in_cuda(dtype, host_runtime, monkeypatch):
    rows, width, longest = 1003, 256, 32
    shape = (-(-rows // longest), width)
    monkeypatch.setattr(host_runtime, "bias_gelu_partial_shape", lambda dy: shape)
    inputs = gelu_table.make_inputs(gelu_table.Case((rows, width)), dtype)
    hold_to_budget(gelu_table, inputs, gelu_table.run(inputs, "cuda"))
