"""Tests that need a GPU: graph capture, streams, offsets beyond 2^31 bytes, several devices."""

import pytest
import torch

from bertfast import packing
from bertfast.ops import (
    attention_qkv,
    available,
    bias_gelu,
    dispatch,
    gated,
    layer_norm,
    linear_cross_entropy,
)
from bertfast.testing import attention as table
from bertfast.testing import hold_to_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
backends = pytest.mark.parametrize("backend", ["triton", "cuda"])


def warmed_up(step):
    """A stream on which the step has compiled, loaded and allocated all that it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    return stream


def replays_with_new_seeds(step):
    """step, captured in a graph, gives other numbers each time, but for torch's seed the same."""
    stream = warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    torch.cuda.manual_seed(1)
    graph.replay()
    first = [value.clone() for value in captured]
    graph.replay()
    assert not torch.equal(captured[0], first[0])
    torch.cuda.manual_seed(1)
    graph.replay()
    for value, other in zip(captured, first, strict=True):
        assert torch.equal(value, other)


@backends
def test_graph_capture_replays_with_new_seeds(backend):
    x, residual = torch.randn(2, 64, 768, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    one = torch.ones(768, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        y = layer_norm(x, one, one, residual=residual, dropout_p=0.5, backend=backend)
        return y, *torch.autograd.grad(y, (x, one), torch.ones_like(y))

    replays_with_new_seeds(step)


@backends
def test_runs_on_the_current_stream(backend):
    one = torch.ones(768, device="cuda")
    layer_norm(torch.randn(8, 768, device="cuda"), one, one, backend=backend)
    stream = torch.cuda.Stream()
    big = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(
            20
        ):  # keeps the stream busy, so that a launch elsewhere would come too early
            big = big @ big * 1e-3
        x = torch.randn(8, 768, device="cuda") + big.sum() * 0
        y = layer_norm(x, one, one, backend=backend)
    stream.synchronize()
    assert torch.equal(y, layer_norm(x, one, one, backend=backend))


@backends
def test_offsets_beyond_32_bits(backend):
    rows, width = 2**31 // 1024 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 6 * rows * width * 2:
        pytest.skip(reason="not enough GPU memory for a tensor of more than 2^31 elements")
    x = torch.randn(rows, width, device="cuda", dtype=torch.float16)
    one = torch.ones(width, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        y = layer_norm(x, one, one, residual=x, backend=backend)
        tail = layer_norm(x[-5:].clone(), one, one, residual=x[-5:].clone(), backend=backend)
    assert torch.equal(y[-5:], tail)


@backends
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_runs_where_its_tensors_are(backend):
    x, one = torch.randn(4, 768, device="cuda:1"), torch.ones(768, device="cuda:1")
    with torch.cuda.device(0):
        y = layer_norm(x, one, one, backend=backend)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert torch.equal(y, layer_norm(x, one, one, backend=backend))


@backends
@pytest.mark.parametrize("op", [bias_gelu, gated])
def test_graph_capture_of_activations(op, backend, need):
    need(op.__name__, (backend, "cuda"))
    x = torch.randn(2, 64, 3072, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(3072, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        y = op(x, bias, backend=backend)
        return y, *torch.autograd.grad(y, (x, bias), torch.ones_like(y))

    stream = warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        x.mul_(-2.0)  # what was captured reads the tensors anew
    graph.replay()
    for value, other in zip(captured, step(), strict=True):
        assert torch.equal(value, other)


def test_graph_capture_of_linear_cross_entropy(need):
    """The host counts no labels, and what was captured finds others at other places."""
    need("linear_cross_entropy", ("triton", "cuda"))
    shapes = (512, 768), (30522, 768), (30522,)
    leaves = [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes]
    labels = torch.full((512,), -100, device="cuda")
    labels[::7] = 5

    def step():
        loss = linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], labelled=100)
        return loss, *torch.autograd.grad(loss, leaves)

    stream = warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    labels.fill_(-100)
    labels[1:100:2] = torch.arange(50, device="cuda") * 600
    graph.replay()
    for value, other in zip(captured, step(), strict=True):
        torch.testing.assert_close(value, other)


@backends
@pytest.mark.parametrize("with_bias", [True, False])
def test_bias_gelu_beyond_2_to_the_31_elements(backend, need, with_bias):
    need("bias_gelu", (backend, "cuda"))
    width = 1024
    bias = torch.randn(width, device="cuda", dtype=torch.float16) if with_bias else None
    for rows in (2**21 - 1, 2**21 + 3):  # the first index overflows only where a tile's end does
        if torch.cuda.mem_get_info()[0] < 6 * rows * width * 2:
            pytest.skip(reason="not enough GPU memory for a tensor of more than 2^31 elements")
        x = torch.randn(rows, width, device="cuda", dtype=torch.float16)
        y = bias_gelu(x, bias, backend=backend)
        assert torch.equal(y[-5:], bias_gelu(x[-5:].clone(), bias, backend=backend))
        assert torch.equal(y[:5], bias_gelu(x[:5].clone(), bias, backend=backend))
        x.requires_grad_()
        (dx,) = torch.autograd.grad(bias_gelu(x, bias, backend=backend), x, y)
        tail = x[-5:].detach().clone().requires_grad_()
        (dtail,) = torch.autograd.grad(bias_gelu(tail, bias, backend=backend), tail, y[-5:].clone())
        assert torch.equal(dx[-5:], dtail)
        del x, y, dx


@backends
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_bias_gelu_runs_where_its_tensors_are(backend, need):
    need("bias_gelu", (backend, "cuda"))
    x, bias = torch.randn(4, 3072, device="cuda:1"), torch.ones(3072, device="cuda:1")
    with torch.cuda.device(0):
        y = bias_gelu(x, bias, backend=backend)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert torch.equal(y, bias_gelu(x, bias, backend=backend))


@pytest.fixture(params=["triton", "cuda"])
def attention_backend(request):
    if reason := available("cuda")["attention"][request.param]:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("lengths", [(128,) * 3, (384, 200, 7), (512, 513)], ids=str)
@pytest.mark.parametrize("layout", ["right", "left", "holes", "packed", "plan"])
def test_attention_at_real_sizes(layout, lengths, head_dim, dtype, attention_backend):
    packed = {"packed": dict(packed=True), "plan": dict(packed=True, plan=True)}
    kind = packed.get(layout, dict(mask=layout))
    if reason := dispatch.unsupported_reason("attention", attention_backend, "cuda", dtype):
        pytest.skip(reason)
    case = table.Case(lengths, heads=3, head_dim=head_dim, p=0.1, **kind)
    inputs = table.make_inputs(case, dtype)
    actual = table.run(inputs, attention_backend, "cuda")
    hold_to_budget(table, inputs, actual)


@pytest.mark.parametrize("planned", [False, True])
def test_attention_in_a_graph(planned, attention_backend):
    """The plan is made inside the capture too: nothing waits for the host."""
    qkv = torch.randn(300, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cu = torch.tensor([0, 20, 150, 170, 300], dtype=torch.int32, device="cuda")

    def step():
        plan = packing.plan(cu, 130, 300) if planned else None
        options = dict(cu_seqlens=cu, max_seqlen=130, plan=plan, dropout_p=0.5)
        out = attention_qkv(qkv, **options, backend=attention_backend)
        return out, *torch.autograd.grad(out, qkv, torch.ones_like(out))

    replays_with_new_seeds(step)


def test_attention_beyond_32_bit_offsets(attention_backend):
    length, heads, width = 512, 16, 64
    batch = 2**31 // (length * 3 * heads * width) + 2
    if torch.cuda.mem_get_info()[0] < 2**33:
        pytest.skip(reason="not enough GPU memory for a tensor of more than 2^31 elements")
    qkv = torch.empty(batch, length, 3, heads, width, device="cuda", dtype=torch.float16)
    qkv.normal_()
    with torch.no_grad():
        out = attention_qkv(qkv, backend=attention_backend)
        tail = attention_qkv(qkv[-1:].clone(), backend=attention_backend)
    assert torch.equal(out[-1:], tail)


def test_attention_of_8192_tokens(attention_backend):
    qkv = torch.randn(1, 8192, 3, 2, 64, device="cuda", dtype=torch.float16)
    out = attention_qkv(qkv, backend=attention_backend)
    right = attention_qkv(qkv.double(), backend="torch")
    assert (out - right).abs().max() < 2e-3 * right.abs().max() + 2**-11


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_attention_runs_where_its_tensors_are(attention_backend):
    qkv = torch.randn(2, 40, 3, 2, 64, device="cuda:1", dtype=torch.float16)
    with torch.cuda.device(0):
        out = attention_qkv(qkv, backend=attention_backend)
    with torch.cuda.device(1):
        assert torch.equal(out, attention_qkv(qkv, backend=attention_backend))
