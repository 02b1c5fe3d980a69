"""`bertfast verify`: the numbers of every op on every backend of this machine, against float64.

Each backend has a process of its own, since Triton's interpreter must be switched on before Triton
is imported and off where it compiles for a GPU. On a machine without a GPU the
Triton kernels run in the interpreter and the CUDA sources in their build for the host.
"""

import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..ops import available, dispatch, native
from ..testing import Finding, compare, interpreter, worst
from .terminal import BAD, GOOD, Column, Progress, Table, console, paragraph

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HOST_PLACES = {"torch": "cpu", "triton": "interpreter", "cuda": "host build"}
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Row:
    """The worst finding of one tensor over all cases."""

    op: str
    backend: str
    where: str
    dtype: str
    tensor: str
    case: str
    max_error: float
    max_budget: float
    rms_error: float
    rms_budget: float
    share: float  # of the budget, the larger of max and RMS
    torch_max_error: float  # stock torch's, in the same dtype and case
    ok: bool


def where(backend: str, device: str) -> str:
    """Name, for people, of the hardware or emulation that runs the backend's kernels."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return HOST_PLACES[backend]


def _gpus(backend: str, device: str) -> Iterator[str]:
    """Has the host build stand in for each GPU that has kernels of its own, and yields the name;
    elsewhere once nothing."""
    if (backend, device) == ("cuda", "cpu"):
        host = native.module_for(torch.empty(0))
        host.set_gpu(90, 1)
        try:
            yield ", as on Hopper"
        finally:
            host.set_gpu(100)
    yield ""


def cases(op: str, device: str) -> list[Any]:
    """The op's quick cases, and on a GPU those that a CPU would take too long for."""
    module = importlib.import_module(f"bertfast.testing.{op}")
    found = list(module.quick_cases())
    if device == "cuda" and hasattr(module, "gpu_cases"):
        found += module.gpu_cases()
    return found


def why_not(op: str, backend: str, device: str, dtype: torch.dtype, case: Any) -> str | None:
    """Why the backend can't run a case, or a dtype, or None."""
    reason = dispatch.unsupported_reason(op, backend, device, dtype)
    features = getattr(case, "features", ())
    if reason is not None or not features:
        return reason
    form = (dtype, case.head_dim, None, features)
    return dispatch.unsupported_reason(op, backend, device, *form)


def check(op: str, backend: str, device: str) -> list[Row]:
    """Runs the op's cases in this process. A case that raises is a fault, not an end."""
    module = importlib.import_module(f"bertfast.testing.{op}")
    rows = []
    for dtype in DTYPES:
        found: dict[str, list[tuple[Finding, str, float]]] = {}
        for case in cases(op, device):
            if why_not(op, backend, device, dtype, case) is not None:
                continue
            inputs = module.make_inputs(case, dtype)
            oracle, stock = module.oracle(inputs), module.plain_torch(inputs)
            limits = module.rounding_model(inputs), module.scales(inputs)
            for as_on in _gpus(backend, device):
                actual = module.run(inputs, backend, device)
                for finding in compare(actual, oracle, *limits):
                    stock_error = (stock[finding.name].double() - oracle[finding.name]).abs().max()
                    entry = (finding, f"{case}{as_on}", stock_error.item())
                    found.setdefault(finding.name, []).append(entry)
        for name, entries in found.items():
            bad = worst([finding for finding, _, _ in entries])
            ((_, case_name, stock_error),) = (entry for entry in entries if entry[0] is bad)
            rows.append(
                Row(
                    op=op,
                    backend=backend,
                    where=where(backend, device),
                    dtype=str(dtype).removeprefix("torch."),
                    tensor=name,
                    case=case_name,
                    max_error=bad.max_error,
                    max_budget=bad.max_budget,
                    rms_error=bad.rms_error,
                    rms_budget=bad.rms_budget,
                    share=bad.share,
                    torch_max_error=stock_error,
                    ok=bad.ok,
                )
            )
    return rows


class Checker:
    """A process that checks ops on one backend, one after another. After a fault it begins anew, as
    an error of CUDA stays with its process."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device
        self._process: subprocess.Popen | None = None
        self._said: Any = None  # what the process prints besides

    def check(self, op: str) -> tuple[list[Row], list[str]]:
        """The rows, and why some or all are left out. A backend that failed is a fault,
        RuntimeError."""
        process: Any = self._process or self._start()
        try:
            process.stdin.write(f"{op}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = process.wait()
            self._said.seek(0)
            error = self._said.read().strip() or f"exit status {status}"
        else:
            answer = json.loads(line)
            error = answer["error"]
        if error is not None:
            self.close()
            raise RuntimeError(error)
        return [Row(**row) for row in answer["rows"]], answer["left_out"]

    def _start(self) -> subprocess.Popen:
        env = dict(os.environ, TRITON_INTERPRET="0" if self.device == "cuda" else "1")
        command = [sys.executable, "-m", "bertfast.commands.verify", self.backend, self.device]
        self._said = tempfile.TemporaryFile("w+")
        # From the package's parent: `-m` puts the working directory first on the path, and another
        # bertfast may lie there, such as a checkout without the compiled modules.
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._said.close()
            self._process = None


def verify(op: str | None = None, backend: str | None = None, as_json: bool = False) -> int:
    """Prints a table for each op as soon as it is done; returns the exit code: 1 if any number is
    outside its budget."""
    out = console()
    ops = [op] if op else list(dispatch.ops())
    backends = [backend] if backend else list(dispatch.BACKENDS)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows: list[Row] = []
    left_out: list[tuple[str, str, str]] = []  # op, where, why
    failed: list[str] = []
    checkers = {(device, one): Checker(one, device) for device in devices for one in backends}
    with contextlib.ExitStack() as started, Progress(len(ops) * len(checkers)) as progress:
        for checker in checkers.values():
            started.callback(checker.close)
        for name in ops:
            found: list[Row] = []
            faults: list[str] = []
            for (device, one), checker in checkers.items():
                place = f"{one} ({where(one, device)})"
                progress.show(f"{name} on {place}")
                try:
                    new, reasons = checker.check(name)
                except RuntimeError as error:
                    faults.append(f"{name} on {place}: {error}")
                else:
                    found += new
                    left_out += [(name, place, reason) for reason in reasons]
                progress.step()
            rows += found
            failed += faults
            if not as_json:
                progress.clear()
                _print_op(out, name, found, faults)
    ok = bool(rows) and not failed and all(row.ok for row in rows)
    if as_json:
        lines = [f"{name} on {place}: {reason}" for name, place, reason in left_out]
        record = {"ok": ok, "rows": [asdict(r) for r in rows], "left_out": lines, "failed": failed}
        print(json.dumps(record, indent=1))
    else:
        _print_end(out, rows, left_out)
    return 0 if ok else 1


def _print_op(out: Console, op: str, rows: list[Row], faults: list[str]) -> None:
    """A line for each backend and dtype: the tensor nearest to its budget."""
    table = Table(
        [
            *(Column(heading, left=True) for heading in ("backend", "dtype", "tensor")),
            *(Column(heading) for heading in ("error", "allowed", "torch's")),
            Column("", left=True),
        ],
        f"{op}: error against float64, and what rounding alone allows",
    )
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.backend, row.where, row.dtype), []).append(row)
    for (backend, place, dtype), group in groups.items():
        row = max(group, key=lambda r: float("inf") if r.share != r.share else r.share)
        ok = all(r.ok for r in group)
        numbers = (f"{e:.1e}" for e in (row.max_error, row.max_budget, row.torch_max_error))
        place = place if place in HOST_PLACES.values() else "GPU"
        verdict = "right" if ok else "WRONG"
        cells = (f"{backend} ({place})", SHORT[dtype], row.tensor, *numbers, verdict)
        table.add(*cells, style=GOOD if ok else BAD)
    if rows:
        table.print(out)
    for row in rows:
        if not row.ok:
            finding = Finding(
                row.tensor, row.max_error, row.max_budget, row.rms_error, row.rms_budget
            )
            text = f"WRONG {row.backend} {row.dtype} {row.case}: {finding}"
            out.print(paragraph(text, indent=2), style=BAD)
    for line in faults:
        out.print(f"FAILED {line}", style=BAD)


def _print_end(out: Console, rows: list[Row], left_out: list[tuple[str, str, str]]) -> None:
    if torch.cuda.is_available():
        out.print(f"GPU: {torch.cuda.get_device_name()}")
    if rows:
        out.print(
            paragraph(
                "Each line is the output or gradient that came nearest to its budget, with its "
                "largest error (the root mean square has a budget of its own) and, last, the error "
                "of stock torch in that dtype."
            )
        )
    else:
        out.print("nothing could be checked", style=BAD)
    by_reason: dict[tuple[str, str], list[str]] = {}
    for op, place, reason in left_out:
        by_reason.setdefault((place, reason), []).append(op)
    for (place, reason), ops in by_reason.items():
        out.print(paragraph(f"left out: {', '.join(ops)} on {place}: {reason}", indent=2))


def _answer(op: str, backend: str, device: str) -> dict:
    reason = available(device)[op][backend]
    if reason is not None:
        return {"rows": [], "left_out": [reason], "error": None}
    forms = itertools.product(DTYPES, cases(op, device))
    reasons = (why_not(op, backend, device, *form) for form in forms)
    left_out = list(dict.fromkeys(reason for reason in reasons if reason is not None))
    rows = [asdict(row) for row in check(op, backend, device)]
    return {"rows": rows, "left_out": left_out, "error": None}


def _main(backend: str, device: str) -> None:
    """Reads an op a line and answers each by a line."""
    if (backend, device) == ("triton", "cpu") and importlib.util.find_spec("triton"):
        interpreter.quicken()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    for line in sys.stdin:
        try:
            answer = _answer(line.strip(), backend, device)
        except Exception:
            answer = {"error": traceback.format_exc().strip()}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    _main(*sys.argv[1:])
