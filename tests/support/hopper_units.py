"""Inputs and results of the units of Hopper's instructions: tests/host_runtime/hopper_units.cu.

Layouts are written down here a second time, from the PTX manual. A unit is run by
`run(name, out_bytes, numbers, bytes) -> bytes`, on the CPU or on a GPU.
"""

import itertools
from collections.abc import Callable

import numpy as np

Run = Callable[[str, int, list[int], bytes], bytes]
THREADS = np.arange(128)
WARP, G, T = THREADS // 32, THREADS % 32 // 4, THREADS % 4
REGISTERS, INNER, OUTER = 0, 1, 2  # from where A comes, and how it lies
# Bytes of a row, columns, where A comes from, how B lies, and whether in bfloat16.
WGMMA_CASES = [
    case
    for case in itertools.product(
        (128, 64), (64, 32, 96, 128), (REGISTERS, INNER, OUTER), (0, 1), (1, 0)
    )
    if case[1] == 64 or case[4]
]


def swizzled(dense: np.ndarray, row_bytes: int) -> np.ndarray:
    """Rows of bytes as they lie in shared memory, from a multiple of 8 rows on: of a byte's address
    bits 4 to 6 (of rows of 64 bytes 4 and 5) are changed by the bits three places above."""
    address = np.arange(dense.size)
    mask = 7 if row_bytes == 128 else 3
    out = np.empty(dense.size, np.uint8)
    out[address ^ (address >> 7 & mask) << 4] = dense.reshape(-1).view(np.uint8)
    return out


def bits_of(values: np.ndarray, bfloat16: int) -> np.ndarray:
    """Values that the 16-bit type holds exactly, as its bits."""
    if bfloat16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16)


def in_shared_memory(matrix: np.ndarray, row_bytes: int, outer: bool) -> bytes:
    """The image of a matrix of (rows of A or columns of B, inner indices) 16-bit values, in whole
    slabs."""
    width = row_bytes // 2  # slabs of so many others, one after the other
    matrix = np.pad(matrix, ((0, -len(matrix) % width), (0, 0)))
    if not outer:
        return swizzled(np.ascontiguousarray(matrix).view(np.uint8), row_bytes).tobytes()
    slabs = [np.ascontiguousarray(matrix[i : i + width].T) for i in range(0, len(matrix), width)]
    return swizzled(np.stack(slabs).view(np.uint8), row_bytes).tobytes()


def a_registers(a: np.ndarray) -> bytes:
    """A's bits as the registers of each thread, 16 inner indices at a time."""
    steps = []
    for k in range(0, a.shape[1], 16):
        registers = np.empty((128, 4), np.uint32)
        for i in range(4):
            row, column = 16 * WARP + G + 8 * (i % 2), k + 2 * T + 8 * (i // 2)
            low, high = a[row, column].astype(np.uint32), a[row, column + 1].astype(np.uint32)
            registers[:, i] = low | high << 16
        steps.append(registers.tobytes())
    return b"".join(steps)


def check_wgmma(
    run: Run, row_bytes: int, columns: int, a_from: int, b_outer: int, bfloat16: int
) -> None:
    """64 x columns sums of integers, which are exact in any order."""
    rng = np.random.default_rng(row_bytes + a_from)
    inner = row_bytes // 2
    a, b = (rng.integers(-100, 100, (others, inner)) for others in (64, columns))
    a_bits, b_bits = bits_of(a, bfloat16), bits_of(b, bfloat16)
    data = in_shared_memory(a_bits, row_bytes, a_from == OUTER)
    data += in_shared_memory(b_bits, row_bytes, bool(b_outer))
    data += a_registers(a_bits)
    numbers = [row_bytes, columns, a_from, b_outer, bfloat16]
    out = run("wgmma", 64 * columns * 4, numbers, data)
    of_thread = np.frombuffer(out, np.float32).reshape(128, columns // 8, 4)
    sums = np.full((64, columns), np.nan)
    for n, i in itertools.product(range(columns // 8), range(4)):
        sums[16 * WARP + G + i // 2 * 8, 8 * n + 2 * T + i % 2] = of_thread[:, n, i]
    np.testing.assert_array_equal(sums, a @ b.T)


# Sizes and boxes, x first, and from where to where a box goes: in the middle, over each end.
COPY_CASES = [
    ((64, 96, 3), (64, 64, 1), (0, 16, 1), (0, 0, 2)),
    ((192, 40, 2), (64, 32, 2), (64, 8, 0), (128, 0, 0)),
    ((96, 40, 2), (32, 64, 1), (32, -8, 1), (64, 24, 0)),
    ((72, 20, 3), (64, 16, 2), (40, 12, 2), (-8, -4, 1)),
    ((40, 256, 1), (32, 256, 1), (0, 1, 0), (16, 0, 0)),
]


def part(tensor: np.ndarray, place: tuple[int, ...], box: tuple[int, ...], write=None):
    """A box of a tensor, with zeros where there is none; or writes the part of it that is there."""
    found = np.zeros(box[::-1], tensor.dtype)
    for at in np.ndindex(*found.shape):
        target = tuple(p + i for p, i in zip(place[::-1], at, strict=True))
        if all(0 <= t < size for t, size in zip(target, tensor.shape, strict=True)):
            if write is not None:
                tensor[target] = write[at]
            found[at] = tensor[target]
    return found


def check_copy(run: Run, sizes, box, source, target) -> None:
    tensor = np.random.default_rng(1).integers(1, 65536, sizes[::-1]).astype(np.uint16)
    expected = np.zeros_like(tensor)
    loaded = part(tensor, source, box)
    part(expected, target, box, write=loaded)
    size = 2 * box[0] * box[1] * box[2]
    numbers = [*sizes, *box, *source, *target]
    out = run("copy", size + tensor.nbytes, numbers, tensor.tobytes())
    image = np.frombuffer(out[:size], np.uint8)
    np.testing.assert_array_equal(image, swizzled(loaded.view(np.uint8), 2 * box[0]))
    stored = np.frombuffer(out[size:], np.uint16).reshape(tensor.shape)
    np.testing.assert_array_equal(stored, expected)


def check_stmatrix(run: Run) -> None:
    """Four 8 x 8 matrices, whose 32 rows go to any places."""
    rng = np.random.default_rng(0)
    matrices, places = rng.integers(0, 65536, (4, 8, 8)).astype(np.uint32), rng.permutation(64)[:32]
    lanes = THREADS[:32]
    g, t = lanes // 4, lanes % 4
    fragments = matrices[:, g, 2 * t] | matrices[:, g, 2 * t + 1] << 16
    data = np.ascontiguousarray(fragments.T).tobytes()
    out = run("stmatrix", 32 * 16, places.tolist(), data)
    np.testing.assert_array_equal(np.frombuffer(out, np.uint16).reshape(4, 8, 8), matrices)


def check_pipeline(run: Run, turns: int, fault: int = 0) -> None:
    rng = np.random.default_rng(turns)
    inner = 32 * turns
    # A sum of at most 2^8 in size is exact in bfloat16.
    a = rng.integers(0, 2, (128, inner)) * rng.choice([-1, 1], (128, inner))
    b = np.where(rng.random((64, inner)) < 100 / inner, rng.choice([-1, 1], (64, inner)), 0)
    data = bits_of(a, 1).tobytes() + bits_of(b, 1).tobytes()
    out = run("pipeline", 128 * 64 * 2, [turns, fault], data)
    np.testing.assert_array_equal(
        np.frombuffer(out, np.uint16).reshape(128, 64), bits_of(a @ b.T, 1)
    )
