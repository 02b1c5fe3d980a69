"""Pre-training in two processes and in one: the same losses; each goes on with the other's run."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from support import pretraining  # noqa: E402
from support.pretraining import ALONE, figures, options, trained  # noqa: E402

from bertfast.recipes.pretrain import meter, train  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
COMMON = dict(micro_batches=4, steps=4, dropout=0.1)
# Two processes add gradients up in another order: a few units of the last place of a loss, which is
# 2^-21 where it is above 4. Muon's steps are made of them in bfloat16, which then may round apart.
ATOL = {"adamw": 2e-6, "stable-adamw": 2e-6, "muon": 2e-5}


def in_two_processes(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join((str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "tests" / "data" / "pretrain_processes.py"), str(folder)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = [
        subprocess.Popen(command, env=os.environ | told | {"RANK": str(rank)}, **pipes)
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, results, strict=True):
        assert process.returncode == 0, errors
    assert "all done" in results[0][0]
    return results[0][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process and of two, side by side."""
    folder = tmp_path_factory.mktemp("processes")
    data = pretraining.prepared(folder)
    patched = pytest.MonkeyPatch()
    update = train.Run._update

    def interrupted(self, rate):
        if self.progress.step + 1 == 2:
            signal.raise_signal(signal.SIGTERM)
        return update(self, rate)

    patched.setattr(train.Run, "_update", interrupted)
    for name in ("begun", "begun-fsdp"):
        assert train.train(options(data, folder / "two" / name, **COMMON), ALONE) == 143
    patched.undo()
    (folder / "said").write_text(in_two_processes(folder))
    for optimizer in ATOL:
        trained(data, folder / optimizer, **COMMON, optimizer=optimizer)
    return folder


def evaluation(run):
    return [told for told in meter.read(run / "metrics.jsonl") if told["kind"] == "held-out"][-1]


def same(run, alone, optimizer="adamw"):
    atol = ATOL[optimizer]
    ours, expected = figures(run), figures(alone)
    assert len(ours) == len(expected)
    for told, wanted in zip(ours, expected, strict=True):
        assert told == pytest.approx(wanted, abs=atol)
    told, wanted = evaluation(run), evaluation(alone)
    del told["kind"], wanted["kind"]
    assert told == pytest.approx(wanted, abs=atol)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("ddp", "adamw"), ("fsdp", "adamw"), ("stable", "stable-adamw"), ("muon", "muon")],
)
def test_two_processes_have_the_losses_of_one(name, optimizer, folder):
    same(folder / "two" / name, folder / optimizer, optimizer)


@pytest.mark.parametrize("name", ["begun", "begun-fsdp"])
def test_two_processes_go_on_with_a_run_of_one(name, folder):
    same(folder / "two" / name, folder / "adamw")
    text = "with 2 processes instead of 1: the order of data is the same"
    assert text in (folder / "said").read_text()


@pytest.mark.parametrize("name", ["left", "left-fsdp"])
def test_one_process_goes_on_with_a_run_of_two(name, folder, capsys):
    run = folder / "two" / name
    assert len(figures(run)) == 3
    trained(folder / "data", run, **COMMON)
    same(run, folder / "adamw")
    text = "step 3, with 1 processes instead of 2: the order of data is the same"
    assert text in capsys.readouterr().out
