"""The Triton kernels, compiled ahead of time. No GPU is needed.

A process of its own for each architecture (compiling.py): compilation fails where Triton's
interpreter is on, and an architecture that the installed Triton doesn't know can take the whole
process down.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import bertfast

from .hot import Hot
from .rows import Row

TAG = "bertfast kernels: "  # starts the subprocess's lines: a compiler may print too


class LeftOut(Exception):
    """This machine can't compile for it; the text says why."""


def version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def read(
    arch: str, modules: list[str], seen: Callable[[Row], None] = lambda row: None
) -> tuple[list[Row], list[str]]:
    """The rows of the modules' Triton kernels for an architecture, and what failed to compile.

    seen: called with each row as soon as it is there.
    """
    if version() is None:
        raise LeftOut("Triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    package = str(Path(bertfast.__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", f"{__package__}.compiling", arch, *modules]
    said, rows = [], []
    # Its errors go into a file: nobody reads that pipe while the other one is read.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        for line in process.stdout or ():
            before, tag, after = line.partition(TAG)
            if tag and not before:
                said.append(json.loads(after))
                if "row" in said[-1]:
                    rows.append(_row(said[-1]["row"]))
                    seen(rows[-1])
        status = process.wait()
        errors.seek(0)
        complaints = errors.read().strip().splitlines() or [f"exit status {status}"]
    end = next((line for line in complaints if "fatal" in line), complaints[-1])
    if {"knows": arch} not in said:
        raise LeftOut(f"Triton {version()} can't compile for {arch}: {end}")
    failures = [line["failed"] for line in said if "failed" in line]
    if status != 0:
        failures.append(f"the compiling process ended after {len(rows)} kernels: {end}")
    return rows, failures


def _row(fields: dict) -> Row:
    for name in ("loads", "stores"):  # JSON's keys are strings
        fields[name] = {int(bits): count for bits, count in fields[name].items()}
    if fields["hot"] is not None:
        fields["hot"] = Hot(**fields["hot"])
    return Row(**fields)
