"""Host time of a call, in Python and torch: no kernel of bertfast runs.

    pytest benchmarks/bench_overhead.py --benchmark-json=FILE

The CUDA path is taken with the kernels compiled for the host and their launch switched off, so the
same Python, checks, allocations and binding run as on a GPU, but for the launch itself. The tensors
are tiny, there is one thread, and what stock torch calls for the same, which does run, stands
beside it. An op without CUDA kernels here is skipped with the reason. Baselines lie in
benchmarks/results; host_time.py measures a whole layer.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bertfast.commands.bench.case import Setting
from bertfast.commands.bench.cases import dry_cases
from bertfast.commands.bench.op_case import OpCase

_host = pytest.importorskip("bertfast._host")
DTYPE = torch.bfloat16  # attention in CUDA takes 16 bits
CASES = list(dict.fromkeys(dataclasses.replace(case, dtype=DTYPE) for case in dry_cases()))


@pytest.fixture(autouse=True)
def dry() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _host.set_dry_launch(True)
    yield
    _host.set_dry_launch(False)
    torch.set_num_threads(threads)


def name(case: OpCase) -> str:
    dropout = f" dropout {case.dropout:g}" if case.dropout else ""
    return f"{case.op} {case.shape} {case.pass_}{dropout}"


@pytest.mark.parametrize("who", ["fused", "stock"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_call(benchmark: BenchmarkFixture, case: OpCase, who: str) -> None:
    wanted = "bertfast cuda" if who == "fused" else case.stock
    provider = next(one for one in case.providers() if one.name == wanted)
    setting = Setting("cpu")
    if reason := provider.why_not(case, setting):
        pytest.skip(reason)
    inputs = case.inputs("cpu", 0)
    step = case.step(provider.make(case, inputs, setting), inputs)
    benchmark.pedantic(step, rounds=1000, iterations=20, warmup_rounds=20)
