"""The proof of the numbers: the error budget, and for each op its cases and rounding model.

Used by `bertfast verify`, by the benchmarks (which check before they time) and by the tests.

One module an op, named after it, with
    cases(), quick_cases()   frozen dataclasses, each with a readable `str`
    gpu_cases()              if it has any: what `bertfast verify` tries on a GPU besides
    make_inputs(case, dtype) CPU tensors, already rounded to the dtype
    run(inputs, backend, device, dtype=None) -> {name: output or gradient}
    rounding_model(inputs)   the same names: float32 arithmetic, rounded where the algorithm must
    plain_torch(inputs)      the same names: stock torch's results in that dtype
"""

from .budget import UNIT_ROUNDOFF, Finding, compare, hold_to_budget, nearest_to_budget, worst

__all__ = [
    "UNIT_ROUNDOFF",
    "Finding",
    "compare",
    "hold_to_budget",
    "nearest_to_budget",
    "worst",
]
