"""The tests that run on the simulated GPU, in processes of their own: the devices have to be there
before torch is imported. There are few, as each imports torch and transformers anew.

    BERTFAST_SIMULATED_GPU=1 pytest tests/simulated

runs them, or any other test, without this file.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import simulated_gpu
from support.simulated_gpu import build

TESTS = Path(__file__).parent
FILES = [*sorted((TESTS / "simulated").glob("test_*.py")), TESTS / "test_gpu.py"]
PROCESSES = 3
# Of test_gpu.py what needs no real GPU, no graph, and no long run of Triton's interpreter.
CHOSEN = "not test_gpu or where_its_tensors_are or "
CHOSEN += "(holes or plan) and cuda and 384 and 64 and not bfloat16"

pytestmark = pytest.mark.skipif(
    simulated_gpu.wanted(), reason="this runs on the simulated GPU already"
)


@pytest.mark.parametrize("number", range(PROCESSES))
def test_on_the_simulated_gpu(number):
    reason = simulated_gpu.why_not()
    if reason is not None:
        pytest.skip(reason)
    pytest.importorskip("bertfast._host", reason="the host build is not there")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfEs",
        "-p",
        "no:cacheprovider",
        "-k",
        CHOSEN,
        *map(str, FILES[number::PROCESSES]),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {simulated_gpu.SWITCH: "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    said = f"{simulated_gpu.SWITCH}=1 {shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("version", "2.12.1+cpu", "was tried with torch 2.13"),
        ("compiler", ["no-such-compiler"], "there is no no-such-compiler"),
        ("kernels", True, "has CUDA devices of its own"),
    ],
)
def test_why_there_is_none(name, value, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(build.importlib.metadata, "version", lambda package: "2.13.0+cpu")
    monkeypatch.setattr(build, "_compiler", lambda: [sys.executable])
    monkeypatch.setattr(build, "_torch", lambda: tmp_path)
    assert build.why_not() is None
    if name == "version":
        monkeypatch.setattr(build.importlib.metadata, "version", lambda package: value)
    elif name == "compiler":
        monkeypatch.setattr(build, "_compiler", lambda: value)
    else:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "libtorch_cuda.so").touch()
    assert reason in build.why_not()
