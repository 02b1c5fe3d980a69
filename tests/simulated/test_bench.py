"""linear_gelu's providers in `bertfast bench`, on a GPU: which run, and that their numbers hold."""

import pytest
import torch

from bertfast.commands.bench.case import Setting
from bertfast.commands.bench.cases import linear_gelu

SETTING = Setting("cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pass_", linear_gelu.PASSES)
def test_our_kernels_are_compared_in_one_and_in_two(pass_, dtype):
    case = linear_gelu.case(pass_, 24, 32, 64, dtype)
    inputs = case.inputs("cuda", 0)
    able = [one for one in case.providers() if one.why_not(case, SETTING) is None]
    ours = [one.name for one in able if one.ours]
    assert ours == ["bertfast triton", "bertfast cuda", "bertfast two kernels"]
    for provider in able:
        if provider.ours or provider.name == "torch eager":
            runner = provider.make(case, inputs, SETTING)
            assert 0 < case.check(provider, runner, inputs) < 0.01
            assert all(y.is_cuda for y in case.step(runner, inputs)())
    (two,) = (one for one in able if one.name == "bertfast two kernels")
    backend, few = case.budget_of(two, "cuda")
    assert backend in ("cuda", "triton") and few.kernels == 2
