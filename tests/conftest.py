"""Which kernels run where. Without a GPU Triton interprets, as is settled before its import."""

import importlib
import importlib.util
import os
from unittest import mock

from support import simulated_gpu

SIMULATED = simulated_gpu.wanted()
if SIMULATED:
    simulated_gpu.start()  # torch asks once, when it is imported, which devices there are

import torch  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

torch.manual_seed(0)  # random values in tables of cases: every process must find the same tests
# The number of threads of every test. Numbers depend on it, as sums are split over threads.
THREADS = int(os.environ.get("BERTFAST_TEST_THREADS", "0"))
if THREADS or SIMULATED or "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(THREADS or 1)  # there is a process for each core already

import pytest  # noqa: E402

from bertfast.nn import attention_block, mlp_block  # noqa: E402
from bertfast.ops import dispatch  # noqa: E402
from bertfast.testing import interpreter  # noqa: E402

if SIMULATED:
    simulated_gpu.install_kernels()
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpreter.quicken()

TRITON = pytest.param(("triton", "cpu"), id="triton", marks=pytest.mark.triton)
HOST = pytest.param(("cuda", "cpu"), id="host", marks=pytest.mark.host)
ON_GPU = [
    pytest.param(("triton", "cuda"), id="triton-gpu", marks=[pytest.mark.triton, pytest.mark.gpu]),
    pytest.param(("cuda", "cuda"), id="cuda-gpu", marks=pytest.mark.gpu),
]
KERNELS = [HOST, *ON_GPU] if GPU else [TRITON, HOST]
if SIMULATED:
    KERNELS = ON_GPU


def pytest_addoption(parser):
    group = parser.getgroup("bertfast")
    group.addoption("--fuzz-seed", type=int, default=0, help="where test_fuzz.py's calls come from")
    group.addoption("--fuzz-first", type=int, default=0, help="the number of its first call")
    group.addoption("--fuzz-calls", type=int, help="how many, of each op on each backend")


def pytest_collection_modifyitems(items):
    """On a GPU the units of Hopper's instructions come first: kernels are made of them."""
    items.sort(key=lambda item: item.path.name != "test_gpu_hopper.py")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=SIMULATED)
def simulated_faults():
    """Fails the test by the simulated GPU's findings. Yields a function that takes them."""
    if not SIMULATED:
        pytest.skip("for the simulated GPU")
    from support.simulated_gpu import cuda

    yield cuda.faults
    assert not (found := cuda.faults()), found


@pytest.fixture(autouse=True)
def _environment():
    """A test gives the environment back, whatever others' code leaves there: PEFT's BOFT leaves CXX
    behind where its CUDA extension can't be built."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def _one_thread(request):
    """The models of these tests are too small for threads to help."""
    threads = torch.get_num_threads()
    small = ("test_hf_", "test_torch_nn", "test_model_", "test_fuzz")
    if not THREADS and request.path.name.startswith(small):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=KERNELS)
def target(request):
    """(backend, device) of each way in which the kernels run on this machine."""
    return request.param


@pytest.fixture
def need():
    """Skips, with the dispatch's own text, what can't run here: an op, or one case (dtype, ...)."""

    def need(op, target, *case):
        reason = dispatch.unsupported_reason(op, *target, *case)
        if reason is not None:
            pytest.skip(reason)

    return need


@pytest.fixture
def finest():
    """float32, or float16 where a backend's kernels of an op take 16-bit types only."""

    def finest(op, target):
        reason = dispatch.unsupported_reason(op, *target, torch.float32)
        return torch.float32 if reason is None else torch.float16

    return finest


@pytest.fixture
def host_runtime():
    """The host build's controls, put back to their defaults afterwards."""
    module = pytest.importorskip("bertfast._host", reason="the host build is not there")
    yield module
    module.set_schedule("depth-first")
    module.set_perturb(False)
    module.set_dry_launch(False)
    module.set_gpu(100)
    module.set_first_block(0)
    module.leave_out("", 0)
    module.reset_records()


@pytest.fixture
def backend(target, need):
    """(name, device) of a backend that runs whole layers, in 16 bits."""
    return _for_layers(target, need)


@pytest.fixture(params=[k for k in KERNELS if k is not TRITON])
def compiled(request, need):
    """As `backend`, but none that is interpreted, which takes a second for each pass of a layer:
    for what doesn't depend on who runs the kernels."""
    return _for_layers(request.param, need)


def _for_layers(target, need):
    for op in ("attention", "layer_norm", "bias_gelu"):
        need(op, target)
    return target


@pytest.fixture
def nodes(monkeypatch):
    """A list to which each node that is made adds its name."""
    made = []
    for module, name in ((attention_block, "attention"), (mlp_block, "mlp")):

        def apply(*arguments, _real=module._apply, _name=name):
            made.append(_name)
            return _real(*arguments)

        monkeypatch.setattr(module, "_apply", apply)
    return made


@pytest.fixture
def exact_rotation(monkeypatch):
    """Some families' rotary positions are float32's in models of float64 too; here they are not."""
    from support import hf_models

    for family in hf_models.KNOWN:
        module = importlib.import_module(family.module)
        if hasattr(module, "apply_rotary_pos_emb"):
            monkeypatch.setattr(module, "apply_rotary_pos_emb", hf_models.rotated)


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone: its mesh of CPUs."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    where = f"file://{tmp_path}/group"
    distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
