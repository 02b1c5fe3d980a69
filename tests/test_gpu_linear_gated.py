"""linear_gated's kernels on a GPU: real sizes, each configuration, graphs, offsets."""

import contextlib

import pytest
import torch
from test_gpu import warmed_up

from bertfast.ops import dispatch, linear_gated
from bertfast.ops.linear_gated import run
from bertfast.testing import hold_to_budget
from bertfast.testing import linear_gated as table
from bertfast.testing.linear_gated import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
BF16 = torch.bfloat16
# ModernBERT's, NomicBERT's, and ragged ones.
SIZES = [
    Case(4096, 768, 1152),
    Case(2048, 768, 3072, activation="silu", bias=False),
    Case(777, 712, 1048, activation="gelu_tanh"),
]
DEVICE = "cuda"


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = dispatch.unsupported_reason("linear_gated", request.param, DEVICE, BF16)
    if reason is not None:
        pytest.skip(reason=reason)
    return request.param


@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=["fp16", "bf16"])
def test_real_sizes(case, dtype, backend):
    inputs = table.make_inputs(case, dtype)
    out = table.run(inputs, backend, DEVICE)
    hold_to_budget(table, inputs, out)
    again = table.run(inputs, backend, DEVICE)
    for name, value in out.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=["fp16", "bf16"])
def test_each_configuration_of_triton(case, dtype, number):
    """Of this GPU's architecture; that it runs at all is what no other test can tell."""
    triton = pytest.importorskip("bertfast.ops.linear.triton")
    from bertfast.ops.linear import config

    reason = triton.unsupported_reason(DEVICE)
    if reason is not None:
        pytest.skip(reason=reason)
    arch = config.architecture(triton.triton_lib.capability(torch.empty(0, device=DEVICE)))
    inputs = table.make_inputs(case, dtype)
    with contextlib.ExitStack() as stack:
        for pass_ in config.GATED:
            known = config.candidates(arch, pass_)
            stack.enter_context(config.trial(pass_, known[min(number, len(known) - 1)]))
        out = table.run(inputs, "triton", DEVICE)
        hold_to_budget(table, inputs, out)
        again = table.run(inputs, "triton", DEVICE)
    for name, value in out.items():
        assert torch.equal(value, again[name]), name


def tensors(rows):
    """x, weight and bias of ModernBERT's size."""
    shapes = ((rows, 768), (2 * 1152, 768), (2 * 1152,))
    return [torch.randn(shape, device=DEVICE, dtype=BF16).mul_(0.05) for shape in shapes]


def test_a_graph_reads_the_tensors_anew(backend):
    x, weight, bias = (tensor.requires_grad_() for tensor in tensors(500))
    down = torch.randn(768, 1152, device=DEVICE, dtype=BF16)
    u = torch.randn(500, 2 * 1152, device=DEVICE, dtype=BF16)

    def step():
        y = linear_gated(x, weight, bias, fused=True, backend=backend)
        choice = run.Choice(backend, None, backend)
        return (y, *run.backward(x.detach(), down, u, bias, "gelu", True, choice))

    stream = warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        x.mul_(-2.0)
    graph.replay()
    for value, other in zip(captured, step(), strict=True):
        assert torch.equal(value, other)


def test_beyond_2_to_the_31_elements(backend):
    rows = 2**31 // (2 * 1152) + 300
    if torch.cuda.mem_get_info()[0] < 4 * rows * 2 * 1152 * 2:
        pytest.skip(reason="not enough GPU memory for tensors of more than 2^31 elements")
    x, weight, bias = tensors(rows)
    choice, last = run.Choice(backend, backend, backend), 8192
    y, u = run.forward(x, weight, bias, "gelu", choice, True)
    # So many rows have the same tiles, and each sum its order, wherever its tile lies.
    tail = x[-last:].clone()
    y_tail, u_tail = run.forward(tail, weight, bias, "gelu", choice, True)
    assert torch.equal(y[-last:], y_tail) and torch.equal(u[-last:], u_tail)
    del y
    down = torch.randn(768, 1152, device=DEVICE, dtype=BF16)
    du, _ = run.backward(x, down, u, bias, "gelu", True, choice)
    near, _ = run.backward(tail, down, u_tail, bias, "gelu", True, choice)
    assert torch.equal(du[-last:], near)
