"""linear_gated as a case of `bertfast bench`: stock torch's backward, all providers' numbers."""

import pytest
import torch

from bertfast.commands.bench.case import Setting
from bertfast.commands.bench.cases import linear_gated as cases
from bertfast.ops.gated.limits import ACTIVATIONS
from bertfast.ops.gated.reference import act

HERE = Setting("cpu", "aot_eager")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_backward_is_the_forwards(activation):
    """In float64: du and dbias are the gradients of u + bias, where dy is that of y down^T."""
    case = cases.case("backward", 10, 32, 64, torch.float32, activation)
    inputs = case.inputs("cpu", 3).double()
    du, dbias = case.step(case.functions["exact"], inputs)()
    given = inputs.leaves
    both = (given["u"] + given["bias"]).requires_grad_()
    gate, value = both.chunk(2, -1)
    y = act(gate, activation) * value
    (right,) = torch.autograd.grad(y @ given["down"].t(), both, given["dy"])
    torch.testing.assert_close(du, right)
    torch.testing.assert_close(dbias, right.sum(0))


@pytest.mark.parametrize("pass_", cases.PASSES)
def test_what_runs_on_a_cpu(pass_):
    """Compiled code too: torch.compile must be able to trace the stock functions."""
    case = cases.case(pass_, 10, 32, 64, torch.float32, "silu")
    inputs = case.inputs("cpu", 0)
    able = [one for one in case.providers() if one.why_not(case, HERE) is None]
    auto = [] if pass_ == "backward" else ["bertfast auto"]
    names = ["bertfast torch", *auto, "torch eager", "torch compile"]
    assert [one.name for one in able] == names
    torch._dynamo.reset()
    for provider in able:
        runner = provider.make(case, inputs, HERE)
        assert 0 < case.check(provider, runner, inputs) < 1e-6
