"""Pre-training killed by SIGKILL at three random points; benchmarks/pretrain_kills.py does more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json
from benchmarks import pretrain_kills
found = pretrain_kills.measure(3, steps=9, worlds=(1,))
assert pretrain_kills.passes(found)
print(json.dumps(found))
"""


def test_a_killed_run_goes_on_to_the_bit():
    """In a process of its own, which starts the runs by forks."""
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-c", PROGRAM]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])["1 process"]
    assert told["points"] == told["the same to the bit"] == len(told["kills"]) == 3
    assert all(kill["resumed"] <= kill["step"] for kill in told["kills"])
    assert any(kill["resumed"] > 0 for kill in told["kills"])


def test_the_committed_figures():
    told = json.loads((ROOT / "benchmarks" / "results" / "pretrain-kills.json").read_text())
    assert told["1 process"]["points"] == told["1 process"]["the same to the bit"] == 20
    assert told["2 processes"]["points"] == 20
    assert told["2 processes"]["largest relative difference"] <= 1e-6
