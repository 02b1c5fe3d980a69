"""Random calls, valid and invalid, of every op on every backend that runs here.

    pytest tests/test_fuzz.py --fuzz-seed 7 --fuzz-calls 2000

makes 2000 other calls of each op and backend. A failure prints the line that repeats it.
"""

import pytest
from support import fuzz

from bertfast.ops import dispatch

# Of each op. The interpreter takes a hundred times the host build's time.
CALLS = {"torch": 200, "cuda": 200, "triton": 25}
TOLD = 5  # failures

KERNEL_OPS = ("layer_norm", "bias_gelu", "attention", "attention_qkv")
CASES = [pytest.param(op, "torch", id=f"{op}-torch") for op in fuzz.CALLS]
for _backend, _mark in (("cuda", pytest.mark.host), ("triton", pytest.mark.triton)):
    CASES += [pytest.param(op, _backend, id=f"{op}-{_mark.name}", marks=_mark) for op in KERNEL_OPS]


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_calls_give_float64s_result_or_name_the_bad_argument(op, backend, request):
    if op in KERNEL_OPS and (reason := dispatch.unsupported_reason(op, backend, "cpu")):
        pytest.skip(reason)
    seed, first, calls = (
        request.config.getoption(f"--fuzz-{name}") for name in ("seed", "first", "calls")
    )
    failures: list[str] = []
    for number in range(first, first + (calls or CALLS[backend])):
        failure = fuzz.attempt(op, backend, seed, number)
        if failure is not None:
            again = f"--fuzz-seed {seed} --fuzz-first {number} --fuzz-calls 1"
            failures.append(f"{failure}\n    pytest '{request.node.nodeid}' {again}")
        if len(failures) == TOLD:
            break
    assert not failures, "\n" + "\n".join(failures)
