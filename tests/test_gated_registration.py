"""gated's registered ops under opcheck, torch.compile, export, functorch and dispatch modes."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses import FakeTensorMode

from bertfast.ops import gated
from bertfast.testing import gated as table
from bertfast.testing.gated import Case

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
CASES = [
    Case((3, 4, 64), bias=True),
    Case((5, 33), activation="silu", layout="rows apart"),
    Case((0, 64), bias=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, target, need):
    need("gated", target)
    backend, device = target
    inputs = table.make_inputs(case, torch.float32)
    x, bias, dy = (
        t if t is None else t.to(device) for t in (inputs[n] for n in ("x", "bias", "dy"))
    )
    forward, backward = torch.ops.bertfast.gated, torch.ops.bertfast.gated_backward
    calls = [(forward, (x, bias, case.activation, False, backend))]
    for want_dbias in {False, case.bias}:
        calls.append((backward, (dy, x, bias, case.activation, True, want_dbias, backend)))
    for op, arguments in calls:
        result = torch.library.opcheck(op.default, arguments, test_utils=OPCHECKS)
        assert set(result.values()) == {"SUCCESS"}, result


class Block(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64, bias=False)
        self.bias = torch.nn.Parameter(torch.randn(64))
        self.backend = backend

    def forward(self, x):
        return gated(self.linear(x), self.bias, activation="silu", backend=self.backend)


def _step(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))


def test_compile_fullgraph_with_dynamic_rows(target, need):
    need("gated", target)
    module = Block(target[0]).to(target[1])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 64, device=target[1])
        for ours, eager in zip(_step(compiled, x), _step(module, x), strict=True):
            assert (ours - eager).abs().max() < 1e-5
    assert counter.frame_count == 1


def test_auto_and_torch_backends_compile():
    x = torch.randn(4, 64)
    for backend in ("auto", "torch"):
        module = Block(backend)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(_step(compiled, x), _step(module, x), strict=True):
            assert (ours - eager).abs().max() < 1e-5


def test_export(target, need):
    need("gated", target)
    module = Block(target[0]).to(target[1]).eval()
    x = torch.randn(2, 5, 64, device=target[1])
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch, 1: length},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("bertfast.gated" in name for name in names), names
    other = torch.randn(3, 7, 64, device=target[1])
    assert (program.module()(other) - module(other)).abs().max() < 1e-5


def test_functorch_runs_the_reference(target, need):
    need("gated", target)
    backend, device = target
    x, bias = torch.randn(6, 4, 32, device=device), torch.randn(32, device=device)

    def f(x, bias):
        return gated(x, bias, backend=backend)

    assert (torch.vmap(f, (0, None))(x, bias) - f(x, bias)).abs().max() < 1e-5
    leaf = bias.clone().requires_grad_()
    f(x, leaf).sum().backward()
    grad = torch.func.grad(lambda b: f(x, b).sum())(bias)
    assert (grad - leaf.grad).abs().max() < 1e-4
    _, tangent = torch.func.jvp(lambda b: f(x, b), (bias,), (torch.ones_like(bias),))
    assert (tangent.sum() - leaf.grad.sum()).abs() < 1e-3


def test_fake_tensors_and_dispatch_modes_see_the_op(target, need):
    need("gated", target)
    backend, device = target
    with FakeTensorMode():
        y = gated(torch.empty(3, 64, device=device), backend=backend)
    assert type(y).__name__ == "FakeTensor" and y.shape == (3, 32)

    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 64, device=device)
    with Log():
        gated(x, backend=backend)
        gated(x.requires_grad_(), backend=backend).sum().backward()
    for name in ("gated", "gated_backward"):
        assert f"bertfast.{name}.default" in seen


def test_subclass_inputs(target, need):
    """A tensor subclass, such as FSDP2's or a quantised weight, goes through the dispatcher."""
    need("gated", target)

    class Tagged(torch.Tensor):
        pass

    x = torch.randn(3, 64, device=target[1])
    tagged = gated(x.as_subclass(Tagged), backend=target[0])
    assert torch.equal(gated(x, backend=target[0]), tagged.as_subclass(torch.Tensor))
