"""The registered ops under opcheck, torch.compile, export, functorch and dispatch modes."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses import FakeTensorMode

from bertfast.ops import layer_norm
from bertfast.testing import layer_norm as table
from bertfast.testing.layer_norm import Case

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
CASES = [
    Case((3, 4, 64), p=0.3, row_index=True),
    Case((3, 4, 64)),
    Case((5, 33), residual=False, x_bias=False),
    Case((5, 64), layout="rows apart"),
    Case((0, 64)),
    Case((3, 4, 64), p=0.3, rms=True, return_sum=True),
    Case((5, 33), residual=False, x_bias=False, bias=False, return_sum=True),
]


def _arguments(case, target, dtype=torch.float32):
    backend, device = target
    inputs = table.make_inputs(case, dtype)
    tensors = [
        inputs[name] if inputs[name] is None else inputs[name].to(device)
        for name in ("x", "weight", "bias", "residual", "x_bias", "seed", "row_index")
    ]
    threshold = round(65536 * case.p)
    if not threshold:
        tensors[5] = None
    numbers = (case.eps, case.rms, threshold, 3)
    return [*tensors, *numbers, backend], inputs["dy"].to(device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, target, need):
    need("layer_norm", target)
    arguments, dy = _arguments(case, target)
    ops = torch.ops.bertfast
    results = [
        torch.library.opcheck(ops.layer_norm.default, arguments, test_utils=OPCHECKS),
        torch.library.opcheck(
            ops.layer_norm_forward.default, [*arguments, case.return_sum], test_utils=OPCHECKS
        ),
    ]
    _, z, mean, rstd = ops.layer_norm_forward(*arguments, case.return_sum)
    x, weight, seed, row_index, threshold = (arguments[i] for i in (0, 1, 5, 6, 9))
    z = z if z.numel() else x
    mean, dsum = None if case.rms else mean, dy.clone() if case.return_sum else None
    for dx_dtype in (None, torch.bfloat16) if threshold else (None,):
        backward = [dy, dsum, z, mean, rstd, weight, seed, row_index, threshold, 3]
        wanted = [True, dx_dtype, True, case.x_bias, arguments[2] is not None, target[0]]
        results.append(
            torch.library.opcheck(
                ops.layer_norm_backward.default, backward + wanted, test_utils=OPCHECKS
            )
        )
    for result in results:
        assert set(result.values()) == {"SUCCESS"}, result


def _module(case, target):
    backend, device = target

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(case.shape[-1], case.shape[-1], bias=False)
            self.x_bias = torch.nn.Parameter(torch.randn(case.shape[-1]))
            self.norm = torch.nn.LayerNorm(case.shape[-1])

        def forward(self, x, seed):
            return layer_norm(
                self.linear(x),
                self.norm.weight,
                self.norm.bias,
                x_bias=self.x_bias,
                residual=x,
                dropout_p=case.p,
                seed=seed,
                eps=1e-5,
                backend=backend,
            )

    return Block().to(device)


def _step(module, x, seed):
    x = x.clone().requires_grad_()
    y = module(x, seed)
    grads = torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))
    return y, *grads


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile_fullgraph(target, need, mode, p):
    need("layer_norm", target)
    case = Case((4, 64), p=p)
    module = _module(case, target)
    x = torch.randn(4, 64, device=target[1])
    seed = torch.tensor([5], device=target[1])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=mode)
    for ours, eager in zip(_step(compiled, x, seed), _step(module, x, seed), strict=True):
        assert (ours - eager).abs().max() < 1e-5
    with torch.no_grad():
        assert (compiled(x, seed) - module(x, seed)).abs().max() < 1e-5


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile_with_dynamic_rows_and_a_drawn_seed(target, need, p):
    need("layer_norm", target)
    module = _module(Case((4, 64), p=p), target)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    compilations = None
    for rows in (3, 5, 9):
        x = torch.randn(rows, 64, device=target[1], requires_grad=True)
        torch.manual_seed(1)
        y = compiled(x, None)
        y.sum().backward()
        torch.manual_seed(1)
        eager = module(x, None)
        if p == 0:  # a traced graph draws its seed as its backend does
            assert (y - eager).abs().max() < 1e-5
        assert x.grad.shape == x.shape
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations


def test_compile_with_one_tensor_given_twice(target, need):
    need("layer_norm", target)
    weight = torch.rand(64, device=target[1], requires_grad=True)

    def f(x):
        return layer_norm(x, weight, weight, residual=x, backend=target[0])

    x = torch.randn(3, 64, device=target[1], requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    dy = torch.randn(3, 64, device=target[1])
    ours = torch.autograd.grad(compiled(x), (x, weight), dy)
    for one, other in zip(ours, torch.autograd.grad(f(x), (x, weight), dy), strict=True):
        assert (one - other).abs().max() < 1e-5


def test_auto_and_torch_backends_compile():
    for backend in ("auto", "torch"):
        module = _module(Case((4, 64), p=0.3), (backend, "cpu"))
        x, seed = torch.randn(4, 64), torch.tensor([5])
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(_step(compiled, x, seed), _step(module, x, seed), strict=True):
            assert (ours - eager).abs().max() < 1e-5


def test_export(target, need):
    need("layer_norm", target)
    module = _module(Case((4, 64)), target).eval()
    x = torch.randn(2, 5, 64, device=target[1])
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(module, (x, None), dynamic_shapes=({0: batch, 1: length}, None))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("bertfast.layer_norm" in name for name in names), names
    other = torch.randn(3, 7, 64, device=target[1])
    assert (program.module()(other, None) - module(other, None)).abs().max() < 1e-5


def test_functorch_runs_the_reference(target, need):
    need("layer_norm", target)
    backend, device = target
    x = torch.randn(6, 4, 32, device=device)
    weight, bias = torch.rand(2, 32, device=device)

    def f(x, weight):
        return layer_norm(x, weight, bias, residual=x, eps=1e-5, backend=backend)

    expected = f(x, weight)
    assert (torch.vmap(f, (0, None))(x, weight) - expected).abs().max() < 1e-5
    leaf = weight.clone().requires_grad_()
    f(x, leaf).sum().backward()
    grad = torch.func.grad(lambda w: f(x, w).sum())(weight)
    assert (grad - leaf.grad).abs().max() < 1e-4
    _, tangent = torch.func.jvp(lambda w: f(x, w), (weight,), (torch.ones_like(weight),))
    assert (tangent - (expected - bias) / weight).abs().max() < 1e-4


def test_fake_tensors_and_dispatch_modes_see_the_op(target, need):
    need("layer_norm", target)
    backend, device = target
    with FakeTensorMode():
        x, weight = torch.empty(3, 64, device=device), torch.empty(64, device=device)
        y = layer_norm(x, weight, weight, backend=backend)
    assert type(y).__name__ == "FakeTensor" and y.shape == (3, 64)

    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, weight = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    with Log():
        layer_norm(x, weight, weight, backend=backend)
        layer_norm(x.requires_grad_(), weight, weight, backend=backend).sum().backward()
    for name in ("layer_norm", "layer_norm_forward", "layer_norm_backward"):
        assert f"bertfast.{name}.default" in seen


def test_meta_and_subclass_inputs(target, need):
    """A tensor subclass, such as FSDP2's or a quantised weight, goes through the dispatcher."""
    need("layer_norm", target)
    backend, device = target

    class Tagged(torch.Tensor):
        pass

    x, weight = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    plain = layer_norm(x, weight, weight, backend=backend)
    tagged = layer_norm(x.as_subclass(Tagged), weight, weight, backend=backend)
    assert torch.equal(plain, tagged.as_subclass(torch.Tensor))
