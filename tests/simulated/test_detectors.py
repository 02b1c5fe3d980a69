"""Each thing that the simulated GPU looks for is found where it is planted."""

import pytest
import torch
import triton
import triton.language as tl
from support.simulated_gpu import cuda, kernels

from bertfast.ops import layer_norm, native, triton_lib
from bertfast.ops.layer_norm import cuda as layer_norm_cuda


def test_there_are_two_devices():
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    x = torch.arange(6.0, device="cuda:1").view(2, 3)
    assert x.device == torch.device("cuda", 1) and x.is_cuda
    assert (x @ x.t()).tolist() == [[5.0, 14.0], [14.0, 50.0]]
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert torch.empty(1, device="cuda").device.index == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_fresh_memory_is_nan(dtype):
    assert torch.empty(5, device="cuda", dtype=dtype).isnan().all()
    assert torch.randn(3, device="cuda").new_empty(2, 2, dtype=dtype).isnan().all()


@pytest.mark.parametrize("place", [-1, 8])
def test_a_write_outside_of_an_allocation_is_found(place, simulated_faults):
    x = torch.zeros(8, device="cuda:1")
    on_host = torch.ops.simulated_gpu.host_view(x).numpy()
    neighbour = on_host.__array_interface__["data"][0] + 4 * place
    import ctypes

    ctypes.c_float.from_address(neighbour).value = 1.0
    assert "a write outside of an allocation of 32 bytes on cuda:1" in simulated_faults()
    assert not simulated_faults()


@triton.jit
def _copy(source, target, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count))


def test_a_kernel_that_writes_too_far_is_found(simulated_faults):
    source, target = torch.ones(8, device="cuda"), torch.empty(7, device="cuda")
    _copy[(1,)](source, target, 8, BLOCK=8)
    assert "a write outside" in simulated_faults()


def test_a_kernel_on_another_device_than_the_current_one_is_found():
    source, target = torch.ones(8, device="cuda:1"), torch.empty(8, device="cuda:1")
    with pytest.raises(AssertionError, match="is for cuda:1, and cuda:0 is current"):
        _copy[(1,)](source, target, 8, BLOCK=8)
    with torch.cuda.device(1):
        _copy[(1,)](source, target, 8, BLOCK=8)
    assert torch.equal(source, target)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_launch_with_tensors_of_two_devices_is_found(backend, monkeypatch):
    """The public function refuses them; what lies below is the kernels' call."""
    x, one = torch.randn(4, 64, device="cuda:1"), torch.ones(64, device="cuda:1")
    with pytest.raises(ValueError, match="weight must be on cuda:1"):
        layer_norm(x, one.to(0), one.to(0), backend=backend)
    with pytest.raises(AssertionError, match="got tensors on"):
        if backend == "triton":
            _copy[(1,)](x, torch.empty(4, 64, device="cuda:0"), 8, BLOCK=8)
        else:
            native.module_for(x).layer_norm_forward(
                *(x, None, None, (one.to(0), one, 1e-5, False), (None, 0, 1.0, 0, None)),
                (torch.empty_like(x), None, None, None, None),
            )


def test_without_on_device_a_triton_op_is_found(monkeypatch):
    import contextlib

    monkeypatch.setattr(triton_lib, "on_device", lambda tensor: contextlib.nullcontext())
    x, one = torch.randn(4, 64, device="cuda:1"), torch.ones(64, device="cuda:1")
    with pytest.raises(AssertionError, match="cuda:0 is current"):
        layer_norm(x, one, one, backend="triton")


def test_an_unwritten_output_is_found(monkeypatch):
    """A kernel that doesn't write: the result is NaN, which no budget lets pass."""
    monkeypatch.setattr(layer_norm_cuda, "forward", lambda *args: None)
    x, one = torch.randn(4, 64, device="cuda"), torch.ones(64, device="cuda")
    assert layer_norm(x, one, one, backend="cuda").isnan().all()


def test_mixed_devices_raise_as_on_a_gpu():
    x, y = torch.randn(3, device="cuda:0"), torch.randn(3, device="cuda:1")
    for other in (y, y.cpu()):
        with pytest.raises(RuntimeError, match="to be on the same device"):
            x + other
        with pytest.raises(RuntimeError, match="to be on the same device"):
            torch.cat([x, other])
    assert torch.equal(
        x + y.cpu().sum(), x + y.sum().to("cuda:0")
    )  # a number may come from the CPU


WAITING = {
    "item": lambda x: x.sum().item(),
    "cpu": lambda x: x.cpu(),
    "if": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "tensor": lambda x: torch.tensor([1.0], device="cuda"),
    "synchronous copy": lambda x: x.copy_(torch.ones(4)),
    "allclose": lambda x: torch.allclose(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave((x > 0).long() + 1),
}
NOT_WAITING = {
    "sum": lambda x: x.sum(),
    "an index": lambda x: x[torch.arange(2, device="cuda")],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "asynchronous copy": lambda x: torch.ones(4).to("cuda", non_blocking=True),
    "copy": lambda x: x.to("cuda:1"),
    "repeat_interleave": lambda x: x.repeat_interleave((x > 2).long() + 1, output_size=4),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_counted(name):
    x = torch.zeros(4, device="cuda")
    before = cuda.waits()
    WAITING[name](x)
    assert cuda.waits() == before + 1, cuda.last_wait()
    with cuda.capture(), pytest.raises(RuntimeError, match="not permitted when stream is captur"):
        WAITING[name](x)


@pytest.mark.parametrize("name", NOT_WAITING)
def test_what_waits_for_nothing_is_not_counted(name):
    x = torch.zeros(4, device="cuda")
    before = cuda.waits()
    with cuda.capture():
        NOT_WAITING[name](x)
    assert cuda.waits() == before, cuda.last_wait()


def test_launches_are_recorded():
    x, one = torch.randn(4, 64, device="cuda:1"), torch.ones(64, device="cuda:1")
    kernels.launches.clear()
    layer_norm(x, one, one, backend="cuda")
    assert kernels.launches == [("layer_norm_forward", 1)]
    layer_norm(x, one, one, backend="triton")
    assert {launch.device for launch in kernels.launches} == {1}
