"""Pre-training in two gloo processes; started twice by test_pretrain_processes.py, which compares
what lies in the folder afterwards."""

import os
import signal
import sys
from pathlib import Path

import torch
from support.pretraining import options

from bertfast.commands.errors import UserError
from bertfast.recipes.pretrain import train
from bertfast.recipes.pretrain.parallel import started

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
COMMON = dict(micro_batches=4, steps=4, dropout=0.1)
# Run -> options that are not common; test_pretrain_processes.py trains each in one process too.
RUNS = {
    "ddp": {},
    "fsdp": dict(fsdp=True),
    "stable": dict(fsdp=True, optimizer="stable-adamw"),
    "muon": dict(fsdp=True, optimizer="muon"),
}


def run(name, processes, **more):
    given = options(FOLDER / "data", FOLDER / "two" / name, **COMMON | RUNS.get(name, {}) | more)
    return train.train(given, processes)


def stopped(name, processes, **more):
    """One of the processes gets a signal in step 3."""
    update = train.Run._update

    def interrupted(self, rate):
        if self.progress.step + 1 == 3 and RANK == 1:
            signal.raise_signal(signal.SIGTERM)
        return update(self, rate)

    train.Run._update = interrupted
    assert run(name, processes, **more) == 143
    train.Run._update = update


def refused(call, text):
    try:
        call()
    except UserError as error:
        assert text in str(error), error
    else:
        raise AssertionError("nothing was raised")


def main():
    torch.set_num_threads(1)
    with started("cpu") as processes:
        for name in RUNS:
            assert run(name, processes) == 0
        # One process began these, in steps of the same four micro-batches.
        for name, more in (("begun", {}), ("begun-fsdp", dict(fsdp=True))):
            assert run(name, processes, **more) == 0
        # One process will go on with these.
        stopped("left", processes)
        stopped("left-fsdp", processes, fsdp=True)
        refused(lambda: run("odd", processes, micro_batches=3), "a multiple of the 2 processes")
        refused(lambda: run("ddp", processes, lr=0.5), "--lr was 0.001 when")
    print("all done")


if __name__ == "__main__":
    main()
