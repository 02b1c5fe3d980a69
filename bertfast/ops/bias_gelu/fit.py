"""Finds the polynomials of the exact GELU.

In a source checkout `python -m bertfast.ops.bias_gelu.fit` writes them to coefficients.py, for
Triton, and to csrc/device/gelu_coefficients.cuh, for CUDA C++.

For z >= 0, with Phi the normal distribution function and phi its density:

    forward    gelu(v) = max(v, 0) - z * Phi(-z),   z = |v|,   Phi(-z) = exp2(p(z))
    backward   gelu'(z) = 1 - gelu'(-z),   gelu'(-z) = Phi(-z) - z * phi(z) = exp(-z^2 / 2) * m(z)

log2(Phi(-z)) is smooth, nearly a parabola; m(z), in essence Mills' ratio less z, is smooth, and
moderate where its factor counts. So one exp2 and one polynomial do, without erf or division.

Each fit minimises the largest error in units of what the output can show: a unit in the last place
of float16 down to its subnormals, or u = 2^-24 of a float32 result. Results below a floor are held
to the absolute error of the floor, since what they are added to or multiplied by is of the size of
1. Where float32 shows it, the value at zero is met exactly.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_erfc = np.vectorize(math.erfc, otypes=[float])


def upper_tail(z: np.ndarray) -> np.ndarray:
    """Phi(-z)."""
    return 0.5 * _erfc(np.asarray(z) / math.sqrt(2))


def bell(z: np.ndarray) -> np.ndarray:
    """phi(z) / phi(0)."""
    return np.exp(-0.5 * np.asarray(z) ** 2)


def float16_ulp(y: np.ndarray) -> np.ndarray:
    """The distance of neighbouring float16 values at |y|."""
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(y), 2.0**-14))) - 10)


@dataclass(frozen=True)
class Fit:
    name: str
    target: Callable[[np.ndarray], np.ndarray]
    weight: Callable[[np.ndarray], np.ndarray]  # of an error in the target, in the fit's unit
    degree: int
    end: float
    unit: str
    at_zero: float | None = None  # a value to meet exactly


def _forward_16(z: np.ndarray) -> np.ndarray:
    # Up to 5.8 the float16 result is not zero. Beyond, the small weight only sees to it that the
    # polynomial goes on falling, so that exp2 comes to zero.
    y = z * upper_tail(z)
    return np.where(z < 5.8, math.log(2) * y / float16_ulp(y), 0.006)


def _forward_32(z: np.ndarray) -> np.ndarray:
    # Near 0, where gelu is v / 2, relative; the tail need not be better than what is beside it.
    y = z * upper_tail(z)
    return math.log(2) * y / (2.0**-24 * np.where(z < 1, y, np.maximum(y, 0.1)))


def _log2_upper_tail(z: np.ndarray) -> np.ndarray:
    return np.log2(upper_tail(z))


def _derivative_by_bell(z: np.ndarray) -> np.ndarray:
    return upper_tail(z) / bell(z) - z / math.sqrt(2 * math.pi)


def _backward_16(z: np.ndarray) -> np.ndarray:
    return bell(z) / float16_ulp(np.maximum(np.abs(bell(z) * _derivative_by_bell(z)), 1e-3))


def _backward_32(z: np.ndarray) -> np.ndarray:
    return bell(z) / (2.0**-24 * np.maximum(np.abs(bell(z) * _derivative_by_bell(z)), 0.2))


FITS = (
    Fit("FORWARD_16", _log2_upper_tail, _forward_16, 6, 14.0, "float16 ulp"),
    Fit("FORWARD_32", _log2_upper_tail, _forward_32, 8, 14.0, "u of max(result, 0.1)", -1.0),
    Fit(
        "BACKWARD_16",
        _derivative_by_bell,
        _backward_16,
        8,
        8.0,
        "float16 ulp of max(result, 0.001)",
    ),
    Fit("BACKWARD_32", _derivative_by_bell, _backward_32, 12, 8.0, "u of max(result, 0.2)", 0.5),
)


def solve(fit: Fit) -> tuple[np.ndarray, float]:
    """Coefficients rising with the power, rounded to float32, and their largest weighted error.

    Lawson's iteration: least squares, with more and more weight where the error is large. A pinned
    value is subtracted, and the rest is z times a polynomial of one degree less.
    """
    # Denser at both ends, where a minimax error has its sharpest peaks; 0 has no relative error.
    z = fit.end * (1 - np.cos(np.linspace(0, np.pi, 1501)[1:])) / 2
    target, weight = fit.target(z), fit.weight(z)
    pinned = fit.at_zero is not None
    basis = np.polynomial.chebyshev.chebvander(2 * z / fit.end - 1, fit.degree - pinned)
    if fit.at_zero is not None:
        target, weight = (target - fit.at_zero) / z, weight * z
    share = np.full(len(z), 1 / len(z))
    least, best = math.inf, np.zeros(0)
    for _ in range(200):
        scale = np.sqrt(share) * weight
        solution = np.linalg.lstsq(basis * scale[:, None], target * scale, rcond=None)[0]
        error = np.abs((basis @ solution - target) * weight)
        if error.max() < least:
            least, best = error.max(), solution
        share = share * error
        share /= share.sum()
    series = np.polynomial.Chebyshev(best, domain=[0, fit.end])
    coefficients = series.convert(kind=np.polynomial.Polynomial).coef
    if fit.at_zero is not None:
        coefficients = np.append(fit.at_zero, coefficients)
    return coefficients.astype(np.float32), weighted_error(fit, coefficients)


def weighted_error(fit: Fit, coefficients: Sequence[float] | np.ndarray) -> float:
    """The largest error in the fit's unit, with float32 coefficients and exact arithmetic."""
    z = np.linspace(0, fit.end, 4001)[1:]
    rounded = np.asarray(coefficients, dtype=np.float32).astype(np.float64)
    value = np.polynomial.polynomial.polyval(z, rounded)
    return float(np.max(np.abs(value - fit.target(z)) * fit.weight(z)))


# There exp2 gives 0 in every form, so |v| needs to go no further.
LIMIT = 16.0

Polynomials = dict[str, tuple[float, ...]]  # name -> coefficients, lowest power first


def _number(coefficient: np.float32) -> float:
    """The float of the fewest digits that rounds to it."""
    return float(np.format_float_scientific(coefficient))


def found() -> Polynomials:
    return {fit.name: tuple(_number(c) for c in solve(fit)[0]) for fit in FITS}


def _about(fit: Fit, polynomials: Polynomials) -> str:
    error = weighted_error(fit, polynomials[fit.name])
    return f"Degree {fit.degree}; largest error {error:.2g} {fit.unit}."


def python_text(polynomials: Polynomials) -> str:
    """coefficients.py."""
    lines = [
        '"""Polynomials of the exact GELU, lowest power first. Written by fit.py, which says what',
        'they are; a test runs it again."""',
        "",
        f"LIMIT = {LIMIT}  # of their argument",
    ]
    for fit in FITS:
        lines += ["", f"# {_about(fit, polynomials)}", f"{fit.name} = ("]
        lines += [f"    {c!r}," for c in polynomials[fit.name]]
        lines += [")"]
    return "\n".join(lines) + "\n"


def cuda_text(polynomials: Polynomials) -> str:
    """csrc/device/gelu_coefficients.cuh: functions, a fused multiply-add for each coefficient."""
    lines = [
        "// Polynomials of the exact GELU. Written by bertfast/ops/bias_gelu/fit.py, which says",
        "// what they are; a test holds them to those of Triton.",
        "#pragma once",
        "",
        '#include "device/cuda.cuh"',
        "",
        "namespace bertfast {",
        "",
        f"inline constexpr float kGeluLimit = {LIMIT}f;  // of their argument",
    ]
    for fit in FITS:
        *lower, highest = polynomials[fit.name]
        lines += ["", f"// {_about(fit, polynomials)}"]
        lines += [f"__device__ __forceinline__ float gelu_{fit.name.lower()}(float z) {{"]
        lines += [f"  float value = {highest!r}f;"]
        lines += [f"  value = fmaf(value, z, {c!r}f);" for c in reversed(lower)]
        lines += ["  return value;", "}"]
    return "\n".join([*lines, "", "}  // namespace bertfast"]) + "\n"


def main() -> None:
    polynomials = found()
    here = Path(__file__).resolve()
    here.with_name("coefficients.py").write_text(python_text(polynomials))
    header = here.parents[3] / "csrc" / "device" / "gelu_coefficients.cuh"
    header.write_text(cuda_text(polynomials))


if __name__ == "__main__":
    main()
