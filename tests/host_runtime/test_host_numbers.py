"""Numbers in the runtime that runs CUDA sources on a CPU: half, bfloat16, approximate functions."""

import math

import numpy as np
import pytest


def floats_around(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Random floats; the narrower format's values, the ties between them, and their neighbours."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 400_000, dtype=np.uint32)
    bias = 2 ** (exponent_bits - 1) - 1
    exponents = rng.integers(-bias - mantissa_bits - 2, min(bias + 3, 128), 400_000)
    mantissas = rng.integers(0, 2 ** (mantissa_bits + 1), 400_000) / 2 ** (mantissa_bits + 1)
    ties = np.ldexp(1 + mantissas, exponents).astype(np.float32)  # half of them values
    ties = np.concatenate([ties, -ties]).view(np.uint32)
    special = np.array([0, math.inf, math.nan, 65504, 65519.996, 65520, 3.4028235e38], np.float32)
    special = np.concatenate([special, -special]).view(np.uint32)
    bits = np.concatenate([anything, ties, ties + 1, ties - 1, special])
    return bits.astype(np.uint32).view(np.float32)


def convert(program, case: str, values: np.ndarray, to: type) -> np.ndarray:
    result = program.run(case, data=values.tobytes())
    assert result.returncode == 0
    return np.frombuffer(result.stdout, to)


def test_float_to_half(program) -> None:
    values = floats_around(5, 10)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    expected = np.where(np.isnan(values), 0x7FFF, expected)
    np.testing.assert_array_equal(convert(program, "to_half", values, np.uint16), expected)


def test_half_to_float(program) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    expected = np.where(np.isnan(values), 0x7FFFFFFF, values.view(np.uint32))
    np.testing.assert_array_equal(convert(program, "from_half", bits, np.uint32), expected)
    back = convert(program, "to_half", values, np.uint16)
    np.testing.assert_array_equal(back, np.where(np.isnan(values), 0x7FFF, bits))


def test_float_to_bfloat16(program) -> None:
    values = floats_around(8, 7)
    bits = values.view(np.uint32).astype(np.int64)
    low, high = bits & 0xFFFF, bits >> 16
    expected = high + ((low > 0x8000) | ((low == 0x8000) & (high % 2 == 1)))
    expected = np.where(np.isnan(values), 0x7FFF, expected)
    np.testing.assert_array_equal(convert(program, "to_bfloat16", values, np.uint16), expected)


def test_bfloat16_to_float(program) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    expected = bits.astype(np.uint32) << 16
    np.testing.assert_array_equal(convert(program, "from_bfloat16", bits, np.uint32), expected)
    back = convert(program, "to_bfloat16", expected.view(np.float32), np.uint16)
    np.testing.assert_array_equal(back, np.where(np.isnan(expected.view(np.float32)), 0x7FFF, bits))


FUNCTIONS = {  # the function in double, the arguments' range, CUDA's maximum error in ulp
    "rsqrtf": (lambda x: 1 / np.sqrt(x), (1e-6, 1e6), 2),
    "exp2f": (np.exp2, (-30, 30), 2),
    "expf": (np.exp, (-30, 30), 2),
    "logf": (np.log, (1e-6, 1e6), 1),
    "erff": (np.vectorize(math.erf), (-3, 3), 2),
    "tanhf": (np.tanh, (-5, 5), 2),
    "__expf": (np.exp, (-30, 30), lambda x: 2 + np.floor(np.abs(1.173 * x))),
    "__fdividef": (lambda x: x / 3, (-9, 9), 2),
    "exp2_approx": (np.exp2, (-30, 30), 4),
    "reciprocal_approx": (lambda x: 1 / x, (1, 2), 1),
}


def apply(program, function: str, x: np.ndarray, perturb: bool, seed: int = 0) -> np.ndarray:
    result = program.run(function, int(perturb), seed, data=x.tobytes())
    assert result.returncode == 0, result.stderr
    return np.frombuffer(result.stdout, np.float32)


def ulps_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many floats further b is than a; they have the same sign."""
    return b.view(np.int32).astype(np.int64) - a.view(np.int32)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_perturb_stays_within_the_documented_error(program, function: str) -> None:
    exact, (low, high), bound = FUNCTIONS[function]
    x = np.random.default_rng(1).uniform(low, high, 20_000).astype(np.float32)
    rounded = exact(x.astype(np.float64)).astype(np.float32)
    bound = bound(x.astype(np.float64)) if callable(bound) else np.full(x.shape, bound)

    plain = apply(program, function, x, perturb=False)
    off = ulps_between(rounded, plain)
    assert np.abs(off).max() <= 1  # the C library's own error

    moved = apply(program, function, x, perturb=True)
    move = ulps_between(plain, moved)
    assert (np.abs(move) <= bound).all()
    # Every distance is reached, both ways, and none is favoured.
    at_bound = np.abs(move) == bound
    assert 0.6 < at_bound.mean() * np.mean(2 / (2 * bound + 1)) ** -1 < 1.4
    assert abs(move.mean()) < 0.05 * bound.mean()

    np.testing.assert_array_equal(apply(program, function, x, perturb=True), moved)
    assert (apply(program, function, x, perturb=True, seed=1) != moved).mean() > 0.5


def test_perturb_leaves_exact_functions_and_special_values(program) -> None:
    x = np.array([2, 3, 5, 7], np.float32)
    np.testing.assert_array_equal(apply(program, "sqrtf", x, perturb=True), np.sqrt(x))
    special = np.array([0, math.inf, -math.inf, math.nan], np.float32)
    for seed in range(5):
        result = apply(program, "exp2f", special[1:], perturb=True, seed=seed)
        np.testing.assert_array_equal(result, [math.inf, 0, math.nan])
        result = apply(program, "rsqrtf", special[:2], perturb=True, seed=seed)
        np.testing.assert_array_equal(result, [math.inf, 0])
        small = apply(program, "exp2_approx", np.array([-126, -126.5], np.float32), True, seed)
        assert small[0] > 0 and small[1] == 0  # subnormal results are flushed
        result = apply(program, "exp2f", np.array([127.99999], np.float32), True, seed)
        assert np.isfinite(result).all()
