"""Tensor-core instructions and asynchronous copies in the runtime that runs CUDA sources on a CPU.

The layouts are written down here a second time, from the PTX manual, and the results are compared
with numpy's product and transpose. For every planted fault the repaired kernel runs too.
"""

from pathlib import Path

import numpy as np
import pytest

SOURCES = Path(__file__).parent
ORDERS = ["depth-first", "reverse", "random"]
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


def site(comment: str) -> str:
    lines = (SOURCES / "matrix.cu").read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if line.endswith(f"// {comment}")]
    assert len(found) == 1, comment
    return f"matrix.cu:{found[0]}"


def to_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Values that the 16-bit type holds exactly, as its bits."""
    if kind == "half":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def exact_values(shape, kind: str, rng) -> np.ndarray:
    """Random numbers that the type holds exactly, from tiny to large."""
    bits = 11 if kind == "half" else 8
    mantissa = rng.integers(-(2**bits) + 1, 2**bits, shape).astype(np.float64)
    return np.ldexp(mantissa, rng.integers(-bits - 4, 0, shape))


def pairs(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, along: str) -> np.ndarray:
    """Registers of two neighbours along a row or a column, the first in the low half."""
    low = matrix[rows, columns].astype(np.uint32)
    other = matrix[rows, columns + 1] if along == "row" else matrix[rows + 1, columns]
    return low | other.astype(np.uint32) << 16


def fragments(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> bytes:
    """The 32 lanes' parts of A (16 x 16 bits), B (16 x 8 bits) and C (16 x 8 floats)."""
    of_a = [pairs(a, G + 8 * (i % 2), 2 * T + 8 * (i // 2), "row") for i in range(4)]
    of_b = [pairs(b, 2 * T + 8 * i, G, "column") for i in range(2)]
    of_c = [c[G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)]
    return b"".join(np.ascontiguousarray(np.stack(x, 1)).tobytes() for x in (of_a, of_b, of_c))


def product(program, a, b, c, kind, perturb=0, seed=0, **options) -> np.ndarray:
    data = fragments(to_bits(a, kind), to_bits(b, kind), c.astype(np.float32))
    result = program.run(f"mma_{kind}", perturb, seed, data=data, **options)
    assert result.returncode == 0, result.stderr
    lanes = np.frombuffer(result.stdout, np.float32).reshape(32, 4)
    d = np.zeros((16, 8), np.float32)
    for i in range(4):
        d[G + 8 * (i // 2), 2 * T + i % 2] = lanes[:, i]
    return d


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_mma_of_integers_is_exact(program, kind: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-100, 100, (16, 16)), rng.integers(-100, 100, (16, 8))
    c = rng.integers(-1000, 1000, (16, 8))
    for perturb in (0, 1):
        np.testing.assert_array_equal(product(program, a, b, c, kind, perturb), a @ b + c)


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
@pytest.mark.parametrize("perturb", [0, 1])
def test_mma_rounds_sums_only(program, kind: str, perturb: int) -> None:
    rng = np.random.default_rng(1)
    a, b = exact_values((16, 16), kind, rng), exact_values((16, 8), kind, rng)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    d = product(program, a, b, c, kind, perturb)
    # 16 additions, each off by at most half a unit in the last place of a partial sum, or by one
    # where it is cut off.
    sizes = np.abs(a) @ np.abs(b) + np.abs(c)
    bound = 16 * 2.0**-24 * (2 if perturb else 1) * sizes
    assert (np.abs(d - (a @ b + c)) <= bound).all()


def test_perturb_depends_on_the_seed_alone(program) -> None:
    rng = np.random.default_rng(2)
    a, b = exact_values((16, 16), "half", rng), exact_values((16, 8), "half", rng)
    c = rng.standard_normal((16, 8))
    plain = product(program, a, b, c, "half")
    moved = [product(program, a, b, c, "half", 1, seed) for seed in range(3)]
    for order in ORDERS:
        again = product(program, a, b, c, "half", 1, 0, order=order)
        np.testing.assert_array_equal(again, moved[0])
    for one, other in ((plain, moved[0]), (moved[0], moved[1]), (moved[1], moved[2])):
        assert (one != other).mean() > 0.3
    # Cut off, not rounded: sums of one sign come out too small.
    exact = np.abs(a) @ np.abs(b)
    short = product(program, np.abs(a), np.abs(b), np.zeros((16, 8)), "half", 1)
    assert (short <= exact).all() and (short < exact).mean() > 0.5


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_ldmatrix(program, transposed: int, order: str) -> None:
    rng = np.random.default_rng(3)
    matrices = rng.integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    places = rng.permutation(64)[:32]
    result = program.run("ldmatrix", transposed, *places, data=matrices.tobytes(), order=order)
    assert result.returncode == 0, result.stderr
    registers = np.frombuffer(result.stdout, np.uint32).reshape(32, 4)
    for i, matrix in enumerate(matrices):
        expected = pairs(matrix.T if transposed else matrix, G, 2 * T, "row")
        np.testing.assert_array_equal(registers[:, i], expected)


FAULTS = {  # case: sites that the message names, what it says, what the repaired kernel computes
    "matrix_without_syncwarp": (["store", "load"], "race on byte", [t % 4 + 1 for t in range(32)]),
    "store_without_syncwarp": (["load", "store"], "race on byte", [t % 4 + 1 for t in range(32)]),
    "copy_without_wait": (["copy", "load"], "no cp_async_wait has waited", range(64)),
    "wait_for_the_wrong_group": (["copy", "load"], "no cp_async_wait has waited", range(64)),
    "copy_without_commit": (["copy", "load"], "no cp_async_wait has waited", range(64)),
    "copy_without_barrier": (["copy", "load"], "race on byte", [t ^ 1 for t in range(64)]),
    "copy_over_a_reader": (["copy", "load"], "race on byte", [t ^ 1 for t in range(64)]),
    "return_before_a_copy_lands": (["copy"], "returned without waiting", [1] * 64),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_caught(program, case: str, order: str) -> None:
    places, words, repaired = FAULTS[case]
    message = program.fault(case, "faulty", order=order)
    assert words in message
    for place in places:
        assert site(f"{case}: {place}") in message
    assert program.good(case, "repaired", order=order).split() == [str(x) for x in repaired]


def test_a_matrix_instruction_needs_its_whole_warp(program) -> None:
    program.fault("half_a_warp", "faulty")
    assert program.good("half_a_warp", "repaired").split() == ["0"] * 32


def test_copies_of_every_size_and_of_nothing(program, sanitized) -> None:
    expected = [[4 * t + 3, 4 * t, 4 * t + 1, 4 * t] if t % 2 == 0 else [0] * 4 for t in range(64)]
    for build in (program, sanitized):
        words = build.good("copy_sizes").split()
        assert [int(word) for word in words] == [x for row in expected for x in row]
