"""bias_gelu's registered ops under opcheck, torch.compile, export, functorch and dispatch modes."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses import FakeTensorMode

from bertfast.ops import available, bias_gelu
from bertfast.testing import bias_gelu as table
from bertfast.testing.bias_gelu import Case

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
CASES = [
    Case((3, 4, 64)),
    Case((5, 33), bias=False, approximate="tanh"),
    Case((5, 64), layout="rows apart"),
    Case((0, 64)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, target, need):
    need("bias_gelu", target)
    backend, device = target
    inputs = table.make_inputs(case, torch.float32)
    x, bias, dy = (
        t if t is None else t.to(device) for t in (inputs[n] for n in ("x", "bias", "dy"))
    )
    tanh = case.approximate == "tanh"
    forward, backward = torch.ops.bertfast.bias_gelu, torch.ops.bertfast.bias_gelu_backward
    calls = [(forward, (x, bias, tanh, backend))]
    for want_dbias in {False, case.bias}:
        calls.append((backward, (dy, x, bias, tanh, True, want_dbias, backend)))
    for op, arguments in calls:
        result = torch.library.opcheck(op.default, arguments, test_utils=OPCHECKS)
        assert set(result.values()) == {"SUCCESS"}, result


class Block(torch.nn.Module):
    def __init__(self, backend, width=64, bias=True):
        super().__init__()
        self.linear = torch.nn.Linear(width, width, bias=False)
        self.bias = torch.nn.Parameter(torch.randn(width)) if bias else None
        self.backend = backend

    def forward(self, x):
        return bias_gelu(self.linear(x), self.bias, backend=self.backend)


def _step(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))


def _hold_compiled_to_eager(backend, device, mode):
    module = Block(backend).to(device)
    x = torch.randn(4, 64, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=mode)
    for ours, eager in zip(_step(compiled, x), _step(module, x), strict=True):
        assert (ours - eager).abs().max() < 1e-5
    with torch.no_grad():
        assert (compiled(x) - module(x)).abs().max() < 1e-5


def test_compile_fullgraph(target, need):
    need("bias_gelu", target)
    _hold_compiled_to_eager(*target, "aot_eager")


def test_compile_with_inductor():
    """Once: it is slow, and what it is given does not depend on the backend."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = available(device)["bias_gelu"]
    backend = next((name for name in ("cuda", "triton") if reasons[name] is None), None)
    if backend is None:
        pytest.skip(f"{reasons['cuda']}; {reasons['triton']}")
    _hold_compiled_to_eager(backend, device, "inductor")


def test_compile_with_dynamic_rows(target, need):
    need("bias_gelu", target)
    module = Block(target[0]).to(target[1])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for rows in (3, 5, 9):
        x = torch.randn(rows, 64, device=target[1], requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert (y - module(x)).abs().max() < 1e-5
        assert x.grad.shape == x.shape
    assert counter.frame_count == 1


def test_compile_with_one_tensor_given_twice(target, need):
    need("bias_gelu", target)

    def f(x):
        return bias_gelu(x, x, backend=target[0])

    x = torch.randn(64, device=target[1], requires_grad=True)
    dy = torch.randn(64, device=target[1])
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(x), x, dy)
    (eager,) = torch.autograd.grad(f(x), x, dy)
    assert (ours - eager).abs().max() < 1e-5


def test_auto_and_torch_backends_compile():
    x = torch.randn(4, 64)
    for backend in ("auto", "torch"):
        module = Block(backend)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(_step(compiled, x), _step(module, x), strict=True):
            assert (ours - eager).abs().max() < 1e-5


def test_export(target, need):
    need("bias_gelu", target)
    module = Block(target[0]).to(target[1]).eval()
    x = torch.randn(2, 5, 64, device=target[1])
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch, 1: length},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("bertfast.bias_gelu" in name for name in names), names
    other = torch.randn(3, 7, 64, device=target[1])
    assert (program.module()(other) - module(other)).abs().max() < 1e-5


def test_functorch_runs_the_reference(target, need):
    need("bias_gelu", target)
    backend, device = target
    x, bias = torch.randn(6, 4, 32, device=device), torch.randn(32, device=device)

    def f(x, bias):
        return bias_gelu(x, bias, backend=backend)

    assert (torch.vmap(f, (0, None))(x, bias) - f(x, bias)).abs().max() < 1e-5
    leaf = bias.clone().requires_grad_()
    f(x, leaf).sum().backward()
    grad = torch.func.grad(lambda b: f(x, b).sum())(bias)
    assert (grad - leaf.grad).abs().max() < 1e-4
    _, tangent = torch.func.jvp(lambda b: f(x, b), (bias,), (torch.ones_like(bias),))
    assert (tangent.sum((0, 1)) - leaf.grad).abs().max() < 1e-4


def test_fake_tensors_and_dispatch_modes_see_the_op(target, need):
    need("bias_gelu", target)
    backend, device = target
    with FakeTensorMode():
        x, bias = torch.empty(3, 64, device=device), torch.empty(64, device=device)
        y = bias_gelu(x, bias, backend=backend)
    assert type(y).__name__ == "FakeTensor" and y.shape == (3, 64)

    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, bias = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    with Log():
        bias_gelu(x, bias, backend=backend)
        bias_gelu(x.requires_grad_(), bias, backend=backend).sum().backward()
    for name in ("bias_gelu", "bias_gelu_backward"):
        assert f"bertfast.{name}.default" in seen


def test_subclass_inputs(target, need):
    """A tensor subclass, such as FSDP2's or a quantised weight, goes through the dispatcher."""
    need("bias_gelu", target)
    backend, device = target

    class Tagged(torch.Tensor):
        pass

    x, bias = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    plain = bias_gelu(x, bias, backend=backend)
    tagged = bias_gelu(x.as_subclass(Tagged), bias, backend=backend)
    assert torch.equal(plain, tagged.as_subclass(torch.Tensor))
