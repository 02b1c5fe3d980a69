"""attention's registered ops under opcheck, compile, export and functorch."""

import re

import pytest
import torch
import torch._dynamo
from torch.fx.experimental.proxy_tensor import make_fx

from bertfast.ops import attention, attention_qkv, layer_norm
from bertfast.testing import attention as table
from bertfast.testing.attention import Case

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize(
    "case",
    [Case((9, 20), mask="left", p=0.3, heads=2), Case((9, 0, 20), packed=True, plan=True)],
    ids=str,
)
def test_opcheck(case, target, need, finest):
    need("attention", target)
    backend, device = target
    inputs = table.make_inputs(case, finest("attention", target))
    options = table.options(inputs, device)
    tiles, tile = (options["plan"].tiles, options["plan"].tile) if case.plan else (None, 0)
    threshold = round(65536 * case.p)
    layout = [options["key_mask"], options["cu_seqlens"], tiles, tile]
    layout += [options["seed"] if threshold else None]
    rest = [*layout, inputs["max_seqlen"] or 0, 0.25, threshold, 3, backend]
    parts = [inputs[name].to(device) for name in table.NAMES]
    dout = inputs["dout"].to(device)
    ops = torch.ops.bertfast
    for suffix, tensors in (("", parts), ("_qkv", [torch.stack(parts, -3)])):
        out, lse = getattr(ops, f"attention{suffix}_forward")(*tensors, *rest)
        for name, arguments in (
            ("", tensors),
            ("_forward", tensors),
            ("_backward", [dout, *tensors, out, lse]),
        ):
            op = getattr(ops, f"attention{suffix}{name}").default
            result = torch.library.opcheck(op, [*arguments, *rest], test_utils=OPCHECKS)
            assert set(result.values()) == {"SUCCESS"}, (name, result)


def _module(target, p, dtype):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(32, 96)

        def forward(self, x, mask, seed):
            qkv = self.linear(x).unflatten(-1, (3, 2, 16))
            options = dict(key_mask=mask, dropout_p=p, seed=seed, backend=target[0])
            return attention_qkv(qkv, **options) + attention(*qkv.unbind(-3), **options)

    return Block().to(target[1], dtype)


@pytest.mark.parametrize(("mode", "p"), [("aot_eager", 0.3), ("inductor", 0.0)])
def test_compile_fullgraph(mode, p, target, need, finest):
    need("attention", target)
    dtype, device = finest("attention", target), target[1]
    module = _module(target, p, dtype)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    mask[1, 5:] = False
    seed = torch.tensor([5], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=mode)

    def step(f):
        torch.manual_seed(0)
        x = torch.randn(2, 9, 32, device=device, dtype=dtype, requires_grad=True)
        y = f(x, mask, seed)
        return y, *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))

    for ours, eager in zip(step(compiled), step(module), strict=True):
        # A linear layer's sums may run in another order, and their results be rounded differently.
        allowed = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * eager.abs().max()
        assert (ours - eager).abs().max() < allowed


@pytest.mark.parametrize("packed", [False, True])
def test_torch_backend_compiles(packed):
    case = Case((9, 0, 20), packed=packed, mask="none" if packed else "right", p=0.2)
    inputs = table.make_inputs(case, torch.float32)
    options = table.options(inputs)

    def f(q, k, v):
        return attention(q, k, v, **options)

    tensors = [inputs[name] for name in table.NAMES]
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert (compiled(*tensors) - f(*tensors)).abs().max() < 1e-5


def test_export(target, need, finest):
    need("attention", target)
    dtype, device = finest("attention", target), target[1]
    module = _module(target, 0.0, dtype).eval()
    x, mask = torch.randn(2, 9, 32, device=device, dtype=dtype), torch.ones(2, 9, dtype=torch.bool)
    mask = mask.to(device)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length}, {0: batch, 1: length}, None)
    program = torch.export.export(module, (x, mask, None), dynamic_shapes=shapes)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("bertfast.attention" in name for name in names), names
    other, mask = (
        torch.randn(3, 7, 32, device=device, dtype=dtype),
        torch.ones(3, 7, dtype=torch.bool),
    )
    mask = mask.to(device)
    difference = program.module()(other, mask, None) - module(other, mask, None)
    assert difference.abs().max() < 128 * torch.finfo(dtype).eps


def test_functorch_runs_the_reference(target, need, finest):
    need("attention", target)
    backend, device = target
    dtype = finest("attention", target)
    q, k, v = torch.randn(3, 4, 2, 7, 1, 16, device=device, dtype=dtype)

    def f(q, k, v):
        return attention(q, k, v, backend=backend)

    mapped = torch.vmap(f)(q, k, v)
    for row in range(4):
        assert (mapped[row] - f(q[row], k[row], v[row])).abs().max() < 128 * torch.finfo(dtype).eps
    _, tangent = torch.func.jvp(lambda v: f(q[0], k[0], v), (v[0],), (v[0],))
    assert (tangent - f(q[0], k[0], v[0])).abs().max() < 128 * torch.finfo(dtype).eps


def test_explicit_backend_never_falls_back(target, need):
    need("attention", target)
    backend, device = target
    q = torch.randn(1, 3, 1, 129, device=device, dtype=torch.float16)
    text = "the head dimension must be between 1 and 128, got 129"
    with pytest.raises(ValueError, match=re.escape(text)):
        attention(q, q, q, backend=backend)
    assert attention(q, q, q).shape == q.shape


def test_numbers_that_stand_for_others_pass_the_checks():
    """Lengths, epsilons and scales are SymInts and SymFloats where something is traced."""

    def padded(x, weight, factor):
        x = layer_norm(x, weight, weight, eps=factor * 1e-5, dropout_p=0.0)
        q = x.unflatten(-1, (2, 8))[None]
        return attention(q, q, q, scale=factor / x.shape[1])[0]

    def packed(x, weight, factor):
        q, length = x.unflatten(-1, (2, 8)), x.shape[0]
        cu = torch.tensor([0, length], dtype=torch.int32)
        return attention(q, q, q, cu_seqlens=cu, max_seqlen=length, scale=factor / x.shape[1])

    torch._dynamo.reset()
    traced = make_fx(padded, tracing_mode="symbolic")(torch.randn(5, 16), torch.ones(16), 3.0)
    for f in (padded, packed):
        compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=True)
        for length, factor in ((5, 3.0), (7, 4.0), (9, 5.0)):
            x, weight = torch.randn(length, 16), torch.ones(16)
            assert (compiled(x, weight, factor) - f(x, weight, factor)).abs().max() < 1e-5
            assert (traced(x, weight, 3.0) - padded(x, weight, 3.0)).abs().max() < 1e-5
