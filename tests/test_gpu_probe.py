"""A backend that a GPU can't run says so before it is chosen. What the probes see is made up."""

from types import SimpleNamespace

import pytest
import torch

from bertfast.ops import available, dispatch, gpu, native, tuned

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Driver:
    """Stands for Triton's."""

    error: Exception | None = None

    @property
    def active(self):
        if self.error is not None:
            raise self.error
        return SimpleNamespace(get_current_target=lambda: None)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, of which a test may change what is seen."""
    seen = SimpleNamespace(
        capability={FIRST: (9, 0), SECOND: (9, 0)},
        probe={0: (None, 13000, 13000), 1: (None, 13000, 13000)},
        driver=Driver(),
    )
    triton_lib = pytest.importorskip("bertfast.ops.triton_lib")
    for op in dispatch.ops():  # a kernel that is imported now would hold for good what is set below
        dispatch.backend_module(op, "triton")

    def capability(device=None):
        return seen.capability[torch.device("cuda", device) if type(device) is int else device]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    module = SimpleNamespace(probe=lambda index: seen.probe[index])
    monkeypatch.setattr(native, "_load", lambda name: (module, None))
    monkeypatch.setattr(native, "build_record", lambda: {"architectures": ["sm_80", "sm_90a"]})
    monkeypatch.setattr(triton_lib, "INTERPRETED", False)
    monkeypatch.setattr(triton_lib, "driver", seen.driver)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setenv(tuned.VARIABLE, "")  # nothing was measured here
    tuned.forget()
    backends = (native, triton_lib)
    for backend in backends:
        backend.unsupported_reason.cache_clear()
    yield seen
    tuned.forget()
    for backend in backends:
        backend.unsupported_reason.cache_clear()


def chosen(device, backend="auto"):
    return dispatch.choose("layer_norm", backend, device, torch.float16, 768)


def test_all_is_well(gpus):
    assert chosen(FIRST) == chosen(SECOND) == "cuda"
    assert set(available(FIRST)["layer_norm"].values()) == {None}


@pytest.mark.parametrize(
    ("error", "driver", "text"),
    [
        ("cudaErrorInsufficientDriver", 12040, "serves CUDA 12.4, .* with CUDA 13.0: a newer"),
        ("cudaErrorUnsupportedPtxVersion", 12080, "serves CUDA 12.8"),
        ("cudaErrorNoKernelImageForDevice", 13000, "compiled for sm_80, sm_90a, .* is sm_90"),
        ("cudaErrorInvalidDeviceFunction", 13000, "compiled for sm_80, sm_90a, .* is sm_90"),
        ("cudaErrorSystemNotReady", 13000, "can't load the kernels: cudaErrorSystemNotReady"),
    ],
)
def test_a_module_that_one_gpu_can_not_load(error, driver, text, gpus):
    gpus.probe[1] = (error, driver, 13000)
    assert chosen(FIRST) == "cuda" and chosen(SECOND) == "triton"
    with pytest.raises(ValueError, match=f"'cuda' can't run layer_norm here: .*{text}"):
        chosen(SECOND, "cuda")


def test_an_old_gpu_beside_a_new_one(gpus):
    gpus.capability[SECOND] = (7, 5)
    assert chosen(FIRST) == "cuda" and chosen(SECOND) == "torch"
    for backend in ("triton", "cuda"):
        reason = available("cuda:1")["bias_gelu"][backend]
        assert reason == "the kernels need compute capability 8.0, this GPU has 7.5"


def test_amds_torch(gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert chosen(FIRST) == "torch"
    assert "ROCm" in gpu.unsupported_reason(FIRST)


def test_without_a_c_compiler_triton_is_not_chosen(gpus):
    gpus.driver.error = RuntimeError("Failed to find C compiler. Set CC.")
    gpus.probe[0] = ("cudaErrorInsufficientDriver", 12040, 13000)
    assert chosen(FIRST) == "torch"
    with pytest.raises(ValueError, match="C compiler and libcuda: Failed to find C compiler"):
        chosen(FIRST, "triton")


def test_the_hosts_module_is_not_asked_for_a_driver(gpus, monkeypatch):
    monkeypatch.setattr(native, "_load", lambda name: (SimpleNamespace(), None))
    assert chosen(FIRST) == "cuda"
