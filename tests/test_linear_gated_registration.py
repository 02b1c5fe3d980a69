"""linear_gated's registered ops under opcheck, torch.compile, export, functorch and modes."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses import FakeTensorMode

from bertfast.ops import linear_gated
from bertfast.testing import linear_gated as table
from bertfast.testing.linear_gated import Case

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
CASES = [
    Case(12, 32, 16),
    Case(5, 40, 24, bias=False, activation="silu", layout="rows apart"),
    Case(0, 32, 16),
]
DTYPE = torch.float16


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, target, need):
    need("linear_gated", target, DTYPE)
    backend, device = target
    inputs = table.make_inputs(case, DTYPE)
    x, weight, bias, dy, down, u = (
        t if t is None else t.to(device) for t in (inputs[n] for n in table.FLOATS)
    )
    ops, form = torch.ops.bertfast, case.activation
    calls = [(ops.linear_gated, (x, weight, bias, form, save, backend)) for save in (False, True)]
    for want_dbias in {False, case.bias}:
        arguments = (dy, down, u, bias, form, want_dbias, backend)
        calls.append((ops.linear_gated_backward, arguments))
    for op, arguments in calls:
        result = torch.library.opcheck(op.default, arguments, test_utils=OPCHECKS)
        assert set(result.values()) == {"SUCCESS"}, result


class Block(torch.nn.Module):
    def __init__(self, backend, fused=True, dtype=DTYPE):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64, dtype=dtype)
        self.options = dict(activation="silu", fused=fused, backend=backend)

    def forward(self, x):
        return linear_gated(x, self.linear.weight, self.linear.bias, **self.options)


def _step(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))


def test_compile_fullgraph_with_dynamic_rows(target, need):
    need("linear_gated", target, DTYPE)
    module = Block(target[0]).to(target[1])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 64, device=target[1], dtype=DTYPE)
        for ours, eager in zip(_step(compiled, x), _step(module, x), strict=True):
            assert torch.equal(ours, eager)
    assert counter.frame_count == 1


@pytest.mark.parametrize("fused", [None, False])
def test_auto_and_torch_backends_compile(fused):
    x = torch.randn(4, 64)
    for backend in ("auto", "torch"):
        module = Block(backend, fused, torch.float32)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(_step(compiled, x), _step(module, x), strict=True):
            assert (ours - eager).abs().max() < 1e-5


def test_export(target, need):
    need("linear_gated", target, DTYPE)
    module = Block(target[0]).to(target[1]).eval()
    x = torch.randn(2, 5, 64, device=target[1], dtype=DTYPE)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch, 1: length},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("bertfast.linear_gated" in name for name in names), names
    other = torch.randn(3, 7, 64, device=target[1], dtype=DTYPE)
    assert torch.equal(program.module()(other), module(other))


def test_functorch_runs_the_reference():
    """fused=None, which a transform takes to two kernels, and those to torch's."""
    x, weight, bias = torch.randn(6, 4, 32), torch.randn(48, 32), torch.randn(48)

    def f(x, bias):
        return linear_gated(x, weight, bias)

    assert (torch.vmap(f, (0, None))(x, bias) - f(x, bias)).abs().max() < 1e-4
    leaf = bias.clone().requires_grad_()
    f(x, leaf).sum().backward()
    grad = torch.func.grad(lambda b: f(x, b).sum())(bias)
    assert (grad - leaf.grad).abs().max() < 1e-3


def test_fake_tensors_and_dispatch_modes_see_the_op(target, need):
    need("linear_gated", target, DTYPE)
    backend, device = target
    with FakeTensorMode():
        given = (torch.empty(size, 64, device=device, dtype=DTYPE) for size in (3, 32))
        y = linear_gated(*given, fused=True, backend=backend)
    assert type(y).__name__ == "FakeTensor" and y.shape == (3, 16)

    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    module, x = Block(backend).to(device), torch.randn(3, 64, device=device, dtype=DTYPE)
    with Log():
        module(x).sum().backward()
    for name in ("linear_gated", "gated_backward"):
        assert f"bertfast.{name}.default" in seen


def test_a_second_derivative_is_refused(target, need):
    need("linear_gated", target, DTYPE)
    module = Block(target[0]).to(target[1])
    x = torch.randn(3, 64, device=target[1], dtype=DTYPE, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        dx.sum().backward()
