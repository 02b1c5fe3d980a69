"""The gates of kernels with wgmma, on machine code of kernels with a fault planted."""

import json
from pathlib import Path

import pytest

from bertfast.commands.kernels import cuda_modules, gates, sass

ROOT = Path(__file__).parents[1]
FENCED, UNFENCED, MIXED = "true, false", "false, false", "true, true"
REMARK = (
    "ptxas info    : (C{}) warpgroup.arrive is injected in around line 85 by compiler to allow use "
    "of registers in GMMA in function '{}'"
)


def has_nvcc():
    try:
        return bool(sass.tool("nvcc"))
    except sass.MissingTool:
        return False


@pytest.mark.skipif(not has_nvcc(), reason="nvcc is not installed")
def test_faults_in_machine_code_are_found(monkeypatch, tmp_path):
    """A missing wgmma_fence compiles, and only a remark tells. So does an mma.sync beside wgmma."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "planted.cu").symlink_to(ROOT / "tests/data/planted_wgmma.cu")
    (tmp_path / "device").symlink_to(ROOT / "csrc/device")
    monkeypatch.setattr(cuda_modules, "SOURCES", tmp_path)
    monkeypatch.setattr(cuda_modules, "module_path", lambda: None)
    found = {row.label: gates.excesses(row) for row in cuda_modules.read("sm_90a")}
    assert found[FENCED] == []
    assert {one.gate for one in found[UNFENCED]} == {"ptxas"}
    assert all("(C7519)" in one.text for one in found[UNFENCED])
    assert found[MIXED] == [("mma.sync", "1 mma.sync in a kernel with 8 wgmma")]


def test_a_remark_is_about_the_function_that_it_names():
    remark = REMARK.format(7519, "one")
    assert gates.warnings(remark, "one") == gates.warnings(remark) == [remark]
    assert gates.warnings(remark, "other") == []
    assert gates.warnings("ptxas info : (C7510) in general", "other") != []


@pytest.mark.parametrize("arch, said", [("sm_90a", REMARK.format(7519, "f")), ("sm_80", "")])
def test_remarks_of_the_build_are_read_with_its_module(monkeypatch, tmp_path, arch, said):
    (tmp_path / "_build.json").write_text(json.dumps({"remarks": [REMARK.format(7519, "f")]}))
    monkeypatch.setattr(cuda_modules, "PACKAGE", tmp_path)
    monkeypatch.setattr(cuda_modules, "module_path", lambda: tmp_path / "_cuda.so")

    def cuobjdump(name, option, *arguments, cwd=None):
        if option == "-xelf":
            (cwd / "a.cubin").touch()
        return f"ELF file 1: a.{arch}.cubin"

    monkeypatch.setattr(cuda_modules, "run_tool", cuobjdump)
    assert cuda_modules._extract(arch, tmp_path) == [(tmp_path / "a.cubin", said)]
