"""linear_log1p_max where the host must not wait for a GPU, nor knows lengths."""

import pytest
import torch
from support.simulated_gpu import cuda, kernels, products

from bertfast.testing import hold_to_budget
from bertfast.testing import linear_log1p_max as table
from bertfast.testing.linear_log1p_max import Case

DEVICE = "cuda:1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("case", table.quick_cases(), ids=str)
def test_the_budget(case, backend, dtype, monkeypatch):
    monkeypatch.setattr(torch, "mm", products.mm)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, backend, DEVICE))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_the_host_never_waits_and_it_can_be_captured(backend, layout):
    inputs = table.make_inputs(Case((6, 0, 9), 8, 21, layout), torch.float32)
    for name in table.NAMES:
        inputs[name] = inputs[name].to(DEVICE)
    inputs["dy"] = inputs["dy"].to(DEVICE)
    inputs["options"] = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in inputs["options"].items()
    }
    results = []
    for context in (torch.no_grad, cuda.capture):
        before, started = cuda.waits(), len(kernels.launches)
        with context(), torch.enable_grad():
            results.append(table.run(inputs, backend, DEVICE))
        assert cuda.waits() == before, cuda.last_wait()
        launched = {each.kernel for each in kernels.launches[started:]}
        assert launched == ({"log1p_max_kernel"} if backend == "auto" else set())
    for one, other in zip(*(found.values() for found in results), strict=True):
        assert torch.equal(one, other)
