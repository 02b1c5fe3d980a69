"""Random calls, valid and invalid, of every op on every backend that runs here.

    pytest tests/test_fuzz.py --fuzz-seed 7 --fuzz-calls 2000

makes 2000 other calls of each op and backend. A failure prints the line that repeats it.
"""

import random

import pytest
import torch
from support import fuzz, fuzz_attention, fuzz_linear_gated, fuzz_log1p_max

from bertfast.ops import dispatch

# Of each op. The interpreter takes a hundred times the host build's time.
CALLS = {"torch": 200, "cuda": 200, "triton": 25}
TOLD = 5  # failures

KERNEL_OPS = ("layer_norm", "bias_gelu", "gated", "linear_gelu", "attention", "attention_qkv")
KERNEL_OPS += ("linear_gated", "linear_cross_entropy", "linear_log1p_max")
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


def _wrong(bad: str | None, error: Exception | None) -> fuzz.Call:
    def run() -> None:
        if error is not None:
            raise error

    return fuzz.Call("a call", run, bad)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (_wrong(None, AssertionError("y: max error 1")), "a call raised AssertionError('y: max er"),
        (_wrong(None, ValueError("x must be")), "a call raised ValueError('x must be')"),
        (_wrong("x", None), "a call was accepted"),
        (_wrong("x", ValueError("max_x must be")), "a call didn't name x: ValueError('max_x must"),
        (_wrong("x", StopIteration()), "a call raised StopIteration()"),
        (_wrong("x", RuntimeError("x")), "a call raised RuntimeError('x')"),
        (_wrong("x", ValueError("x must be")), None),
        (_wrong(None, None), None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_a_call_is_told(call, said, monkeypatch):
    monkeypatch.setitem(fuzz.CALLS, "toy", lambda rng, backend: call)
    told = fuzz.attempt("toy", "torch", 0, 0)
    assert told is None if said is None else told.startswith(said)


@pytest.mark.parametrize("op", KERNEL_OPS)
def test_a_wrong_result_is_seen(op, monkeypatch):
    """Outputs a hundredth too large: every valid call of every op must fail."""
    for name in KERNEL_OPS:
        tables = (fuzz.norm_table, fuzz.gelu_table, fuzz.loss_table, fuzz.gated_table)
        tables += (fuzz_attention.attention_table, fuzz_log1p_max.max_table)
        for module in (fuzz, fuzz_attention, fuzz_linear_gated, *tables):
            if (right := getattr(module, name, None)) is not None:

                def wrong(*args, right=right, **kwargs):
                    y = right(*args, **kwargs)
                    return y if y.dtype == torch.float64 else y * 1.01

                monkeypatch.setattr(module, name, wrong)
    seen = [fuzz.attempt(op, "torch", 0, number) for number in range(40)]
    assert sum(told is not None and "max error" in told for told in seen) >= 10, seen


def test_a_call_is_made_from_its_numbers_alone():
    for op, make in fuzz.CALLS.items():
        texts = [[make(random.Random(f"{n}"), "torch").text for n in range(9)] for _ in "ab"]
        assert texts[0] == texts[1] and len(set(texts[0])) > 1, op
