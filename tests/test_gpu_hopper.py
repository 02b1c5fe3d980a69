"""Hopper's instructions on a GPU, as csrc/device wraps them: products by wgmma, bulk copies, and
both in a pipeline with barriers and warps of different roles.

On the CPU the same kernels give the same numbers (tests/host_runtime/test_host_hopper.py). What
only a GPU can tell is whether its layouts and its order are those of the emulation: so these tests
come before all others (tests/conftest.py). The kernels are compiled here and run in a process of
their own, as one that hangs can only be ended with its process.
"""

import subprocess
import threading
from pathlib import Path

import pytest
import torch
from support import hopper_units as units

from bertfast.commands.kernels.sass import MissingTool, tool

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "tests/host_runtime"
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", f"-I{SOURCES}"]
FLAGS += ["-gencode=arch=compute_90a,code=sm_90a"]
SECONDS = 20  # for a unit, which takes milliseconds once CUDA has started

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="there is no GPU of compute capability 9.0 here"),
]


class Program:
    """The units' program, started again after an error."""

    def __init__(self, path):
        self.path = path
        self.process = None

    def run(self, name, out_bytes, numbers, data):
        if self.process is None:
            self.process = subprocess.Popen([self.path], stdin=-1, stdout=-1, stderr=-1)
        timer = threading.Timer(SECONDS, self.process.kill)
        timer.start()
        try:
            words = [name, out_bytes, len(data), len(numbers), *numbers]
            self.process.stdin.write(" ".join(map(str, words)).encode() + b"\n" + data)
            self.process.stdin.flush()
            out = self.process.stdout.read(out_bytes)
        except BrokenPipeError:
            out = b""
        timer.cancel()
        if len(out) < out_bytes:
            said = self.end() or f"no answer within {SECONDS} seconds"
            pytest.fail(f"{name} {numbers}: {said}")
        return out

    def end(self):
        """Ends the process; returns its complaints."""
        process, self.process = self.process, None
        if process is None:
            return ""
        return process.communicate()[1].decode()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    try:
        compiler = tool("nvcc")
    except MissingTool as missing:
        pytest.skip(str(missing))
    path = str(tmp_path_factory.mktemp("hopper") / "units")
    sources = map(str, sorted(SOURCES.glob("hopper_*.cu")))
    done = subprocess.run([compiler, *FLAGS, *sources, "-o", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = Program(path)
    yield program.run
    program.end()


@pytest.mark.parametrize("case", units.WGMMA_CASES, ids=str)
def test_products_of_a_warpgroup(run, case):
    units.check_wgmma(run, *case)


@pytest.mark.parametrize("case", units.COPY_CASES, ids=str)
def test_boxes_are_loaded_and_stored(run, case):
    units.check_copy(run, *case)


def test_fragments_are_stored(run):
    units.check_stmatrix(run)


@pytest.mark.parametrize("turns", [1, 2, 7, 64])
def test_a_pipeline(run, turns):
    units.check_pipeline(run, turns)
