"""Launches of Triton kernels as a GPU would see them: forms, captures, host time. Nothing runs."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.triton
FORWARD = {"attention_fwd_kernel", "bias_gelu_fwd_kernel", "layer_norm_fwd_kernel"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Of a process without the interpreter, in which Triton compiles."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, str(ROOT / "tests/data/mocked_launches.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("packed", "full"),
    [(True, False), (False, True), (True, True)],
    ids=["packed", "padded", "mixed"],
)
def test_a_hundred_batches_compile_few_kernels(training, packed, full, seen):
    """Mixed: packed, but for batches that have no padding, whose forms are the padded ones."""
    case = dict(training=training, packed=packed, full=full)
    (names,) = (row["names"] for row in seen["variants"] if row.items() >= case.items())
    assert set(names) >= FORWARD
    allowed = 12 if not training else 25 if packed and full else 20
    assert len(names) <= allowed, Counter(names)


@pytest.mark.parametrize("training", [False, True])
def test_a_capture_after_the_documented_warm_up_compiles_and_loads_nothing(training, seen):
    case = dict(training=training, packed=False)
    (row,) = (row for row in seen["captured"] if row.items() >= case.items())
    assert row["error"] is None and row["inside"] == []
    assert row["launched"] == (12 if training else 4)


@pytest.mark.parametrize("training", [False, True])
def test_a_capture_that_would_compile_says_so_before_it_does(training, seen):
    """Three calls packed the batch; a capture can't look at the mask, and keeps the padding."""
    case = dict(training=training, packed=True)
    (row,) = (row for row in seen["captured"] if row.items() >= case.items())
    assert "attention_fwd_kernel has not run in this form" in row["error"]
    assert "optimize(model, packed=False)" in row["error"]
    assert row["inside"] == [] and row["launched"] == 0


@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_real_compiler_makes_what_a_forward_launches(capability, seen):
    row = seen["compiled"][capability]
    assert row["compiled"] == sorted(FORWARD)
    assert row["launches"] == 3 * 4


def test_a_known_form_is_the_one_that_triton_would_take(seen):
    row = seen["same forms"]
    assert row["same"]
    assert row["launches"] > 5 * row["forms"] > 400


def test_hooks_of_a_profiler_are_told_of_each_launch(seen):
    first, known, hooked, after = seen["told"]
    assert first and hooked and not known and not after


def test_launches_pass_tritons_binder(seen):
    assert seen["share"] < 0.7  # of the host time of Triton's own way; 0.43 was measured
