"""How bertfast is built and installed: setup.py, what the archives hold, CI's script."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import bertfast

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
TREE = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"]
# Packages are built here without isolation, by what the `test` extra brings.
BUILD = """
import sys
sys.path.insert(0, ".")
import setup
setup.DEFAULT_CUDA_HOME = "nowhere"
setup.main()
"""

NVCC_WITH_REMARKS = """#!/bin/sh
case "$*" in *Xptxas=-v*)
  echo "ptxas info    : (C7519) injected in function 'f'" >&2
  echo "ptxas info    : Used 168 registers" >&2
esac
while [ $# -gt 0 ]; do
  case "$1" in
    -o) touch "$2" ;;
    -MF) echo "$2:" > "$2" ;;
    --list-gpu-code) echo sm_90 ;;
  esac
  shift
done
"""

needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, in an empty directory and without a default place for CUDA."""
    spec = importlib.util.spec_from_file_location("bertfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEFAULT_CUDA_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what goes into a distribution."""
    for name in TREE:
        shutil.copy(ROOT / name, tmp_path)
    for name in ("bertfast", "csrc", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


def fake_nvcc(directory: Path, known: str = "sm_80 sm_90") -> dict[str, str]:
    """An environment in which nvcc is a script that knows some architectures."""
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / "nvcc"
    script.write_text(f"#!/bin/sh\necho {known} V12.4.131\n")
    script.chmod(0o755)
    return {"PATH": str(directory)}


def test_cuda_can_be_demanded(package, tmp_path):
    env = {"PATH": str(tmp_path), "BERTFAST_CUDA": "1"}
    with pytest.raises(SystemExit, match="BERTFAST_CUDA=1, but nvcc was not found.* CUDA_HOME"):
        package.build_module("_cuda", "_cuda.so", env)


def test_host_can_be_demanded(package, tmp_path):
    env = {"PATH": str(tmp_path), "BERTFAST_HOST": "1"}
    with pytest.raises(SystemExit, match=r"BERTFAST_HOST=1, but the C\+\+ compiler g\+\+ was not"):
        package.build_module("_host", "_host.so", env)


@pytest.mark.parametrize(
    "module, variable", [("_cuda", "BERTFAST_CUDA"), ("_host", "BERTFAST_HOST")]
)
def test_modules_can_be_declined(package, module, variable):
    path, record = package.build_module(module, "unused.so", {**os.environ, variable: "0"})
    assert path is None
    assert record[module] == f"{variable}=0 was set when bertfast was installed"


def test_settings_that_make_no_sense_are_errors(package, tmp_path):
    with pytest.raises(SystemExit, match="BERTFAST_CUDA must be 0, 1 or unset, got 'yes'"):
        package.build_module("_cuda", "_cuda.so", {"BERTFAST_CUDA": "yes"})
    with pytest.raises(SystemExit, match="expected sm_NN or sm_NNa, got 9.0"):
        package.architectures("nvcc", {"BERTFAST_CUDA_ARCHS": "sm_80,9.0"})
    with pytest.raises(SystemExit, match="BERTFAST_SANITIZE must be address or unset"):
        package.host_recipe({**os.environ, "BERTFAST_SANITIZE": "thread", "CXX": "sh"})


def test_nvcc_is_found(package, tmp_path):
    on_path = fake_nvcc(tmp_path / "path")
    home = fake_nvcc(tmp_path / "home" / "bin")["PATH"]
    assert package.nvcc(on_path) == str(tmp_path / "path" / "nvcc")
    assert package.nvcc({**on_path, "CUDA_HOME": str(Path(home).parent)}) == f"{home}/nvcc"
    fake_nvcc(tmp_path / "bin")
    assert package.nvcc({"PATH": ""}) == str(tmp_path / "bin" / "nvcc")  # DEFAULT_CUDA_HOME


def test_architectures(package, tmp_path):
    compiler = fake_nvcc(tmp_path)["PATH"] + "/nvcc"
    assert package.architectures(compiler, {}) == ["sm_80", "sm_90a"]  # those that this nvcc knows
    asked = {"BERTFAST_CUDA_ARCHS": "sm_120, sm_80;sm_90a"}
    assert package.architectures(compiler, asked) == ["sm_80", "sm_90a", "sm_120"]
    assert package.gencode([["sm_80"], ["sm_90a", "sm_120"]]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90a",
        "-gencode=arch=compute_90,code=sm_120",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert package.gencode([["sm_90a"]], portable=False) == [
        "-gencode=arch=compute_90a,code=sm_90a"
    ]


@pytest.mark.parametrize(
    "source, all_archs, two",
    [
        (
            "attention/backward_dq.cu",
            [["sm_80"], ["sm_86"], ["sm_90a"], ["sm_100"], ["sm_120"]],
            [["sm_80"], ["sm_86"]],
        ),
        (
            "attention/backward_dq_double.cu",
            [["sm_80"], ["sm_90a"], ["sm_100", "sm_120"]],
            [["sm_80"]],
        ),
        ("layer_norm.cu", [["sm_80"], ["sm_90a", "sm_100", "sm_120"]], [["sm_80"]]),
        ("gated.cu", [["sm_80"], ["sm_90a"], ["sm_100", "sm_120"]], [["sm_80"]]),
        ("attention/forward_bulk.cu", [["sm_90a"]], [["sm_80"]]),
        ("linear_gelu/launch.cu", [["sm_80"]], [["sm_80"]]),
    ],
)
def test_each_source_is_compiled_where_its_code_differs(package, source, all_archs, two):
    source = f"csrc/kernels/{source}"
    assert package.archs_of(source, ["sm_80", "sm_86", "sm_90a", "sm_100", "sm_120"]) == all_archs
    assert package.archs_of(source, ["sm_80", "sm_86"]) == two
    assert package.archs_of(source, ["sm_120"]) == [["sm_120"]]


def test_sources_whose_code_goes_by_shared_memory_are_compiled_for_each(package):
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc" / "kernels").rglob("*.cu")
        if re.search("blocks_that_fit|kSharedMemory", path.read_text())
    }
    assert found == set(package.BY_SHARED_MEMORY)


def test_only_files_without_kernels_go_without_code_for_a_gpu(package):
    """Or whose kernels are for Hopper alone, which multiply by what only sm_90a has."""
    for path in (ROOT / "csrc" / "kernels").rglob("*.cu"):
        text = path.read_text()
        assert path.as_posix().endswith(package.WITHOUT_KERNELS) == ("__global__" not in text)
        if path.as_posix().endswith(package.FOR_HOPPER):
            guards = r"\) \{\n#if(def)? .*(__CUDA_ARCH_FEAT_SM90_ALL|BERTFAST_\w+)"
            assert all(re.search(guards, body) for body in text.split("__global__")[1:]), path


@needs_cxx
def test_a_failing_compilation_leaves_the_module_out(package, tmp_path):
    (tmp_path / "csrc" / "host").mkdir(parents=True)
    (tmp_path / "csrc" / "host" / "a.cpp").write_text('#warning "a long story"\n' * 30)
    (tmp_path / "csrc" / "bindings").mkdir()
    (tmp_path / "csrc" / "bindings" / "b.cpp").write_text("int broken = undeclared_name;\n")
    env = {**os.environ, "BERTFAST_HOST": ""}
    path, record = package.build_module("_host", "_host.so", env)
    assert path is None
    assert record["_host"].startswith("its compilation failed:")
    assert "undeclared_name" in record["_host"] and "a long story" not in record["_host"]
    assert "g++" in record["cxx"] and "-DBERTFAST_HOST" in record["flags"]["_host"]
    with pytest.raises(
        SystemExit, match="(?s)BERTFAST_HOST=1, but its compilation.*undeclared_name"
    ):
        package.build_module("_host", "_host.so", {**env, "BERTFAST_HOST": "1"})


@needs_cxx
def test_only_what_changed_is_compiled_again(package, tmp_path):
    for name, text in {
        "kernels/one.cu": '#include "device/shared.cuh"\n',
        "kernels/two.cu": "int two;\n",
        "device/shared.cuh": "int shared;\n",
        "host/runtime.cpp": "int runtime;\n",
        "bindings/module.cpp": "int module;\n",
    }.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def build() -> dict[str, int]:
        module, record = package.build_module("_host", "_host.so", os.environ)
        assert module is not None and record["_host"] is None
        objects = (tmp_path / "build" / "host").rglob("*.o")
        return {path.name: path.stat().st_mtime_ns for path in objects}

    first = build()
    assert sorted(first) == ["bindings.cpp.o", "one.cu.o", "runtime.cpp.o", "two.cu.o"]
    assert build() == first
    (tmp_path / "csrc" / "device" / "shared.cuh").write_text("long shared;\n")
    second = build()
    assert {name for name in first if second[name] != first[name]} == {"one.cu.o"}
    (tmp_path / "csrc" / "bindings" / "another.cpp").write_text("int another;\n")
    third = build()
    assert {name for name in first if third[name] != second[name]} == {"bindings.cpp.o"}


def test_ptxas_remarks_are_recorded(package, tmp_path):
    """Those of sources that didn't have to be compiled again too."""
    for name in ("kernels/one.cu", "bindings/module.cpp"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True)
        path.touch()
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(NVCC_WITH_REMARKS)
    script.chmod(0o755)
    env = {"PATH": f"{script.parent}:{os.environ['PATH']}"}
    for _ in range(2):
        path, record = package.build_module("_cuda", "_cuda.so", env)
        assert path is not None
        assert record["remarks"] == ["ptxas info    : (C7519) injected in function 'f'"]


def test_a_wheel_without_compilers_is_pure(tree):
    (tree / "bertfast" / f"_host{SUFFIX}").write_text("an earlier install's module")
    (tree / "bertfast" / "_build.json").write_text("an earlier install's record")
    env = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
    env["PATH"] = str(tree / "nothing")
    command = [sys.executable, "-c", BUILD, "bdist_wheel", "--dist-dir", "wheels"]
    subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True, timeout=120)
    (wheel,) = (tree / "wheels").iterdir()
    assert wheel.name == f"bertfast-{bertfast.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("bertfast/_build.json"))
    assert not [name for name in names if name.endswith(".so")]
    assert "bertfast/ops/__init__.py" in names
    assert record["_cuda"].startswith("nvcc was not found")
    assert record["_host"].startswith("the C++ compiler g++ was not found")
    assert record["architectures"] == [] and record["nvcc"] is None


def test_the_source_distribution_can_build_everything(tree):
    (tree / "bertfast" / f"_host{SUFFIX}").write_text("a module")
    command = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", command], cwd=tree, check=True, capture_output=True)
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert wanted and wanted <= names
    assert set(TREE) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]


def test_the_version_stands_in_one_place():
    source = (ROOT / "bertfast" / "__init__.py").read_text()
    assert re.search(rf'^__version__ = "{re.escape(bertfast.__version__)}"$', source, re.M)
    for name in ("setup.py", "pyproject.toml"):
        assert bertfast.__version__ not in (ROOT / name).read_text()
    try:
        installed = importlib.metadata.version("bertfast")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == bertfast.__version__


def project_table() -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10: pytest brings it
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_direct_dependency_is_pinned():
    table = project_table()
    extras = table["project"]["optional-dependencies"].values()
    direct = [*table["build-system"]["requires"], *table["project"]["dependencies"]]
    direct += [requirement for extra in extras for requirement in extra]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9-]+)==([^;\s]+)(?:; .*)?", line).groups()
            pins[name] = version
    names = {re.match(r"[A-Za-z0-9-]+", requirement)[0] for requirement in direct}
    assert names == set(pins)
    for tool in ("ruff", "clang-format"):  # formatting differs between versions
        assert f"{tool}=={pins[tool]}" in table["project"]["optional-dependencies"]["test"]


@pytest.mark.parametrize("number, expected", [(1, "bertfast"), (2, "pytest")])
def test_ci_reads_the_readme(number, expected):
    block = subprocess.run(
        [ROOT / ".ci" / "run", "block", str(number)], check=True, capture_output=True, text=True
    ).stdout
    assert expected in block and "pip install" in block and "```" not in block
    subprocess.run(["bash", "-n"], input=block, check=True, text=True)


@pytest.mark.host
def test_the_copy_under_test_is_the_one_meant():
    copy = os.environ.get("BERTFAST_TESTED_COPY")
    if copy is None:
        pytest.skip("BERTFAST_TESTED_COPY is unset: whichever bertfast is imported is tested")
    from bertfast import _host

    assert Path(bertfast.__file__).is_relative_to(copy)
    assert Path(_host.__file__).is_relative_to(copy)
    record = json.loads((Path(copy) / "bertfast" / "_build.json").read_text())
    assert "-fsanitize=address" in record["flags"]["_host"]
