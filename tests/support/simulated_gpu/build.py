"""The library of the simulated devices: built once for each version of its sources and of torch."""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[2] / "build" / "simulated_gpu"
TRIED_WITH = "2.13."  # it registers with parts of torch that may change from version to version
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-DAT_PER_OPERATOR_HEADERS")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _torch() -> Path:
    """The folder of torch, which is not imported: that would be too early."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent


def why_not() -> str | None:
    """Why there can be no simulated GPU here."""
    version = importlib.metadata.version("torch")
    if not version.startswith(TRIED_WITH):
        return f"the simulated GPU was tried with torch {TRIED_WITH}*, this is {version}"
    if sys.platform != "linux":
        return "the simulated GPU is for Linux"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "this torch has CUDA devices of its own: the simulated GPU is for its CPU build"
    if shutil.which(_compiler()[0]) is None:
        return f"the simulated GPU is compiled here, and there is no {_compiler()[0]}"
    return None


def library() -> Path:
    """The compiled library. Several processes may ask at once: one of them compiles."""
    torch = _torch()
    digest = hashlib.sha256(repr((importlib.metadata.version("torch"), FLAGS)).encode())
    for source in sorted(HERE.glob("*.h")) + [HERE / "simulated.cpp"]:
        digest.update(source.read_bytes())
    path = CACHE / f"{digest.hexdigest()[:16]}.so"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(torch, path)
    return path


def _compile(torch: Path, path: Path) -> None:
    half_done = path.with_suffix(".part")
    include = torch / "include"
    command = [
        *(*_compiler(), *FLAGS, f"-I{include}", f"-I{include}/torch/csrc/api/include"),
        *(str(HERE / "simulated.cpp"), "-o", str(half_done)),
        *(f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
    half_done.replace(path)
