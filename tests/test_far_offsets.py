"""Elements beyond the 2^31st: in memory that is reserved, of which only what is touched exists."""

import mmap

import pytest
import torch
import torch.nn.functional as F

from bertfast.ops import dropout
from bertfast.ops.layer_norm.run import Gradients, Saved

FAR = 2**31
MORE = 4500


@pytest.fixture
def far_row():
    """Makes a tensor of 2^31 elements and some more, in the middle of memory that a wrapped index
    may reach too: it then shows as a wrong number and not as a crash."""
    made = []

    def make(dtype: torch.dtype = torch.float16, before: bool = False) -> torch.Tensor:
        """before: with the 2^31 elements that lie before it."""
        reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0x4000)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
        try:
            made.append(mmap.mmap(-1, dtype.itemsize * (2 * FAR + MORE), flags=flags))
        except OSError as error:
            pytest.skip(reason=f"this machine doesn't reserve the memory: {error}")
        whole = torch.frombuffer(made[-1], dtype=dtype)
        return whole if before else whole[FAR:]

    return make


@pytest.fixture
def last_program(monkeypatch):
    """Of a launch of Triton's interpreter only the last program runs."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def only_the_last(launch):
        def run(grid, pointers, strides, numbers, constants, num_warps):
            builder = interpreter.interpreter_builder
            program_id = builder.create_get_program_id
            last = builder.get_int32(grid[0] - 1)
            monkeypatch.setattr(builder, "create_get_program_id", lambda axis: last)
            try:
                launch.kernel[(1,)](*pointers, *strides, *numbers, *constants)
            finally:
                monkeypatch.setattr(builder, "create_get_program_id", program_id)

        return run

    return only_the_last


@pytest.mark.triton
@pytest.mark.parametrize("backward", [False, True])
def test_bias_gelu_of_one_row(backward, far_row, last_program, monkeypatch):
    triton = pytest.importorskip("bertfast.ops.bias_gelu.triton")
    if not triton.triton_lib.INTERPRETED:
        pytest.skip(reason="on a GPU test_gpu.py runs the whole of it")
    x, y = far_row(), far_row()
    x[-MORE:] = torch.randn(MORE)
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(triton, name, last_program(getattr(triton, name)))
    if backward:
        y[-MORE:] = 1.0
        triton.backward(y, x, None, False, y, None)  # in place
        block = triton.backward_config(x.numel(), 2, 1, True).block_n
    else:
        triton.forward(x, None, False, y)
        block = triton.forward_config(x.numel(), 2, True).block_n
    own = x.numel() % block  # the elements of the last program
    assert 0 < own < MORE
    wide = x[-own:].double().requires_grad_()
    right = F.gelu(wide)
    if backward:
        (right,) = torch.autograd.grad(right.sum(), wide)
    torch.testing.assert_close(y[-own:].double(), right, rtol=1e-3, atol=1e-4, check_dtype=False)


@pytest.fixture(params=[80, 90], ids=["addresses", "descriptors"])
def products(request):
    """The module of linear_gelu's kernels, made for an architecture."""
    module = pytest.importorskip("bertfast.ops.linear.triton")
    if not module.triton_lib.INTERPRETED:
        pytest.skip(reason="only the interpreter runs a single program")
    token = module.triton_lib.capability_without_device.set(request.param)
    yield module
    module.triton_lib.capability_without_device.reset(token)


LAUNCHES = [
    f"_by_{how}{pass_}" for how in ("pointers", "descriptors") for pass_ in ("", "_backward")
]


@pytest.mark.triton
def test_rows_of_a_product_beyond_2_to_the_31_elements(
    products, far_row, last_program, monkeypatch
):
    """2^28 rows of 8: the last tile of y, u and dv."""
    for name in LAUNCHES:
        monkeypatch.setattr(products, name, last_program(getattr(products, name)))
    x, y, u = (far_row()[: -(MORE % 8)].view(-1, 8) for _ in range(3))
    own = x.shape[0] % 128
    assert 0 < own
    x[-own:] = torch.randn(own, 8)
    weight = torch.randn(8, 8).half()
    products.forward(x, weight, None, False, y, u)
    right = x[-own:].double() @ weight.double().T
    close = dict(rtol=1e-2, atol=1e-2, check_dtype=False)
    torch.testing.assert_close(u[-own:].double(), right, **close)
    torch.testing.assert_close(y[-own:].double(), F.gelu(right), **close)
    wide = u[-own:].double().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(wide).sum(), wide)
    products.backward(x, weight, u, None, False, y, None)
    torch.testing.assert_close(
        y[-own:].double(), x[-own:].double() @ weight.double() * slope, **close
    )


@pytest.mark.triton
def test_rows_of_a_product_far_apart(products, far_row):
    """The last row of each operand begins at the 2^31st element or later."""
    apart = (FAR // 7 // 8 + 1) * 8
    x, weight = (far_row().as_strided((8, 8), (apart, 1)) for _ in range(2))
    x.copy_(torch.randn(8, 8))
    weight.copy_(torch.randn(8, 8))
    found = []
    for rows, other in ((x, weight), (x.contiguous(), weight.contiguous())):
        y, dv, u = (torch.empty(8, 8, dtype=x.dtype) for _ in range(3))
        products.forward(rows, other, None, False, y, u)
        products.backward(rows, other, u, None, False, dv, None)
        found.append((y, u, dv))
    for far, near in zip(*found, strict=True):
        assert torch.equal(far, near)


@pytest.mark.host
def test_rows_of_layer_norm_in_cuda_that_end_near_2_to_the_31(far_row, host_runtime):
    """The last block's rows. It would come to the 2^31st if that were one of them, and must end."""
    rows, blocks = 3 * 2**29, 7 * 2**28 // 10
    apart = 4 * blocks  # rows that all blocks take at a time
    last = [n for first in (apart - 4, 2 * apart - 4) for n in range(first, first + 4)]
    wrapped = 3 * apart - 4 - 2**32  # of the 32-bit number that would come next
    assert last[-1] < rows < 2**31 < wrapped + 2**32

    def column(dtype=torch.float16):
        return far_row(dtype)[:rows].view(rows, 1)

    dy, z, mean, rstd = column(), column(), column(torch.float32), column(torch.float32)
    for tensor in (dy, z, mean, rstd):
        tensor[last] = torch.randn(8, 1).to(tensor.dtype)
    written = far_row(before=True)
    written[FAR + wrapped] = 7.0
    dz = written[FAR : FAR + rows].view(rows, 1)
    host_runtime.set_first_block(blocks - 1)
    host_runtime.layer_norm_backward(
        *(dy, None, Saved(z, mean.view(-1), rstd.view(-1)), torch.ones(1).half()),
        dropout.NO_DROPOUT,
        Gradients(dz, None, None, None, None),
        torch.empty(0, blocks, 1),
    )
    h = (z[last].double() - mean[last]) * rstd[last]
    right = -rstd[last] * h * (dy[last] * h)
    torch.testing.assert_close(dz[last].double(), right, rtol=1e-3, atol=1e-4)
    assert written[FAR + wrapped] == 7.0
