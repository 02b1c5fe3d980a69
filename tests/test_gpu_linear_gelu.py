"""linear_gelu's kernels on a GPU: real sizes, each configuration, graphs, offsets, devices."""

import contextlib

import pytest
import torch
from test_gpu import warmed_up

from bertfast.ops import dispatch, linear_gelu
from bertfast.ops.linear import run
from bertfast.testing import hold_to_budget
from bertfast.testing import linear_gelu as table
from bertfast.testing.linear_gelu import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
BF16 = torch.bfloat16
# More tiles than programs that walk over them, whole tiles and ragged ones.
SIZES = [Case(4096, 768, 3072), Case(1000, 1024, 4096), Case(777, 712, 2904, approximate="tanh")]
DEVICE = "cuda"


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = dispatch.unsupported_reason("linear_gelu", request.param, DEVICE, BF16)
    if reason is not None:
        pytest.skip(reason=reason)
    return request.param


def tensors(rows, device=DEVICE, dtype=BF16):
    """x, weight and bias of a base model."""
    shapes = ((rows, 768), (3072, 768), (3072,))
    return [torch.randn(shape, device=device, dtype=dtype).mul_(0.05) for shape in shapes]


@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=["fp16", "bf16"])
def test_real_sizes(case, dtype, backend):
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, backend, DEVICE))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_each_configuration_of_triton(case, number):
    """Of this GPU's architecture; that it runs at all is what no other test can tell."""
    triton = pytest.importorskip("bertfast.ops.linear.triton")
    from bertfast.ops.linear import config

    reason = triton.unsupported_reason(DEVICE)
    if reason is not None:
        pytest.skip(reason=reason)
    arch = config.architecture(triton.triton_lib.capability(torch.empty(0, device=DEVICE)))
    inputs = table.make_inputs(case, BF16)
    with contextlib.ExitStack() as stack:
        for pass_ in config.PASSES:
            known = config.candidates(arch, pass_)
            stack.enter_context(config.trial(pass_, known[min(number, len(known) - 1)]))
        out = table.run(inputs, "triton", DEVICE)
        hold_to_budget(table, inputs, out)
        again = table.run(inputs, "triton", DEVICE)
    for name, value in out.items():
        assert torch.equal(value, again[name]), name


def test_a_graph_reads_the_tensors_anew(backend):
    x, weight, bias = (tensor.requires_grad_() for tensor in tensors(500))

    def step():
        y = linear_gelu(x, weight, bias, fused=True, backend=backend)
        choice = run.Choice(backend, None, backend)
        down = weight.t().contiguous()
        dv = run.backward(x.detach(), down, y.detach(), bias, False, (True, True), choice)
        return (y, *dv)

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
    rows = 2**31 // 3072 + 300
    if torch.cuda.mem_get_info()[0] < 4 * rows * 3072 * 2:
        pytest.skip(reason="not enough GPU memory for tensors of more than 2^31 elements")
    x, weight, bias = tensors(rows)
    choice = run.Choice(backend, backend, backend)
    y, u = run.forward(x, weight, bias, False, choice, True)
    # So many rows have the same tiles, and each sum its order, wherever its tile lies.
    last = 8192
    tail = x[-last:].clone()
    y_tail, u_tail = run.forward(tail, weight, bias, False, choice, True)
    assert torch.equal(y[-last:], y_tail) and torch.equal(u[-last:], u_tail)
    del y
    down = weight.t().contiguous()
    wanted = (True, True)
    dv, _ = run.backward(x, down, u, bias, False, wanted, choice)
    near, _ = run.backward(tail, down, u_tail, bias, False, wanted, choice)
    assert torch.equal(dv[-last:], near)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_runs_where_its_tensors_are(backend):
    given = tensors(100, "cuda:1")
    with torch.cuda.device(0):
        y = linear_gelu(*given, fused=True, backend=backend)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert torch.equal(y, linear_gelu(*given, fused=True, backend=backend))
