"""Launches of Triton's kernels of products with an activation as a GPU would see them. Nothing
runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.triton
KERNELS = {
    "80": ("linear_act_kernel", "linear_act_backward_kernel"),
    "90": ("linear_act_tma_kernel", "linear_act_tma_backward_kernel"),
}
archs = pytest.mark.parametrize("arch", KERNELS)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Of a process without the interpreter, in which Triton compiles."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, str(ROOT / "tests/data/mocked_products.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@archs
def test_a_hundred_batches_of_two_models_compile_one_form_of_each_pass(arch, seen):
    forward, backward = KERNELS[arch]
    assert seen["variants"][arch] == {
        "f": [forward],
        "fs": [forward, forward],  # without u and with it
        "b": ["column_sum_kernel", backward],
    }


@archs
def test_and_so_do_those_of_two_models_with_gated_mlps(arch, seen):
    forward, backward = KERNELS[arch]
    row = seen["gated"][arch]
    assert row["names"] == ["column_sum_kernel", backward, forward, forward]
    assert row["launches"] == 100 * 4
    assert seen["gated maps"] == 4 + 4  # of a, b, y and u; of a, b, u and du


@archs
def test_the_real_compiler_makes_what_is_launched(arch, seen):
    forward, backward = KERNELS[arch]
    row = seen["compiled"][arch]
    assert row["names"] == sorted(["column_sum_kernel", forward, forward, backward])
    assert row["launches"] == 2 * 4
    # Of a, b and y; with u; of a, b, u and dv. Each launch makes its own.
    assert row["described"] == (2 * (3 + 4 + 4) if arch == "90" else 0)
    assert len(row["sizes"]) == 3
    most = {"80": 163, "90": 113}[arch] * 1024  # on sm_90 two blocks share a multiprocessor
    for _, warps, shared, scratch in row["sizes"]:
        assert warps == 4 and shared <= most and scratch == 0


@archs
def test_a_capture_compiles_nothing(arch, seen):
    row = seen["captured"][arch]
    assert row["inside"] == [] and row["launches"] == 2
    assert f"{KERNELS[arch][0]} has not run in this form before" in row["error"]


def test_a_kernel_that_does_not_fit_is_an_error(seen):
    said = seen["unfit"]
    assert said["fits"] is None
    assert said["spills"] == "linear_act_tma_kernel: 24 registers spill"
    assert "can't be compiled: PassManager::run failed" in said["compiler"]
    assert "out of resource: threads" in said["threads"]
    assert "out of resource: shared memory" in said["shared memory"]


def test_a_trial_launches_its_candidate(seen):
    for names in seen["trials"]:
        assert sorted(names) == ["column_sum_kernel", "linear_act_tma_backward_kernel"]


@pytest.mark.parametrize("begin, apart", [(1, 24), (0, 12)], ids=["begin", "apart"])
def test_rows_that_are_not_aligned_have_no_descriptor(begin, apart):
    launch = pytest.importorskip("bertfast.ops.triton_launch")
    storage = torch.zeros(100, dtype=torch.float16)
    assert launch.describe(storage.as_strided((2, 8), (24, 1)), (2, 8)).strides == (24, 1)
    with pytest.raises(AssertionError, match="16-byte aligned"):
        launch.describe(storage.as_strided((2, 8), (apart, 1), begin), (2, 8))
