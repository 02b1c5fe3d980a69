"""Checks of csrc/device by a plain C++ compiler: its headers beside each other, and launches."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
FAKE = ROOT / "tests/data/fake_cuda"
CXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None, reason="there is no g++ here")


def run(*command, text=None):
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_headers_stand_beside_each_other():
    """In one source, in this order and the other way round."""
    headers = sorted(path.relative_to(CSRC).as_posix() for path in CSRC.glob("device/**/*.cuh"))
    assert len(headers) > 15
    flags = ("-std=c++17", "-DBERTFAST_HOST", "-fsyntax-only", "-Wno-unknown-pragmas", f"-I{CSRC}")
    for order in (headers, headers[::-1]):
        source = "".join(f'#include "{header}"\n' for header in order)
        assert run(CXX, *flags, "-xc++", "-", text=source) == (0, "")


def test_a_launch_on_a_fake_runtime(tmp_path):
    program = tmp_path / "launches"
    flags = ("-std=c++17", "-O1", "-pthread", "-Wno-builtin-macro-redefined", f"-I{FAKE}")
    command = (CXX, *flags, f"-I{CSRC}", str(FAKE / "launches.cpp"), "-o", str(program))
    assert run(*command) == (0, "")
    assert run(program) == (0, "")
