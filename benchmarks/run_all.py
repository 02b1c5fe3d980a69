"""Everything that a machine can tell about bertfast's speed, in one command.

    python benchmarks/run_all.py [--out DIR] [--minutes 9] [--dry-run]

On a GPU machine with torch, triton, nvcc, pybind11, ninja and pytest, without network and without
bertfast installed: builds the extension in place for that GPU, runs the tests, measures ceilings,
checks and times every op, most important first. Rows go into DIR/results.csv as they are known, and
a run that reaches its time limit ends cleanly. Exit status 1 if a step failed or a number is wrong.

--dry-run goes through every step on a CPU in a minute: the build is only looked at, the tests are
only collected, tiny shapes are timed, and the rows go into DIR/dry-run.csv. Without a GPU that is
what happens in any case.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Run:
    """What the steps share."""

    out: Path
    dry: bool
    end: float  # on time.monotonic's clock
    seconds: float
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    flop_per_s: float | None = None  # of the best matrix product, once measured on a GPU

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def left(self) -> float:
        return self.end - time.monotonic()

    def over(self) -> bool:
        return self.left() <= 0

    def command(self, command: list[str], log: str, seconds: float, **env: str) -> int | None:
        """Runs it with its output in a log. The exit status; None where the time was over."""
        path = self.out / log
        with path.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGTERM)  # its own session: pytest and its children
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                return None

    def tail(self, log: str, lines: int) -> str:
        return "\n".join((self.out / log).read_text(errors="replace").splitlines()[-lines:])


def build(run: Run) -> None:
    """The extension, in place, for the GPU that is here and no other."""
    import torch

    if run.dry:
        _build_dry(run)
        return
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {"BERTFAST_CUDA": "1", "BERTFAST_CUDA_ARCHS": arch}
    start = time.monotonic()
    status = run.command(command, "build.log", run.left(), **env)
    print(f"built for {arch} in {time.monotonic() - start:.0f} s: exit status {status}")
    if status != 0:
        run.faults.append(f"the build failed (exit status {status}); see build.log")
        print(run.tail("build.log", 15))
    importlib.invalidate_caches()


def _build_dry(run: Run) -> None:
    """Whether the build could run: setup.py answers, and which compilers it would find."""
    status = run.command([sys.executable, "setup.py", "--name"], "build.log", 30)
    tools = {name: shutil.which(name) or "absent" for name in ("nvcc", "g++")}
    print(f"build not run; setup.py answers: {'yes' if status == 0 else 'no'}, {tools}")
    if status != 0:
        run.faults.append("setup.py doesn't answer; see build.log")


def tests(run: Run) -> None:
    """Tests that need a GPU, then all others, each with a share of the time."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if run.dry:
        status = run.command([*pytest, "--collect-only"], "tests.log", 40)
        print(f"tests only collected: {run.tail('tests.log', 1)}")
        if status not in (0, 5):
            run.faults.append(f"pytest could not collect (exit status {status}); see tests.log")
        return
    for name, marks, share in (("tests-gpu", "gpu", 0.15), ("tests", "not gpu", 0.3)):
        command = [*pytest, "-m", marks, f"--junitxml={run.out / name}.xml"]
        status = run.command(command, f"{name}.log", min(run.left(), share * run.seconds))
        if status is None:
            run.left_out.append(f"{name}: the rest of it, its share of the time was over")
        elif status not in (0, 5):  # 5: no test has these marks
            run.faults.append(f"{name}: exit status {status}; see {name}.log")
        print(f"{name}: {run.tail(f'{name}.log', 1 if status in (0, 5) else 12)}")


def ceilings(run: Run, recorder):
    """Copy bandwidth, launch gap and matrix products; returns the copy, the floor of most ops."""
    import torch

    from bertfast.bench import ceilings as measured
    from bertfast.bench.record import Row

    megabytes, repeats = (16, 5) if run.dry else (2048, 15)
    copy = measured.copy_bandwidth(run.device, megabytes, repeats)
    clock = "host" if run.dry else "device"
    row = Row("torch", "copy", "", f"{megabytes}MB", "uint8", clock=clock, cache="cold")
    row.gb_per_s, row.percent_of_floor = copy.bytes_per_s / 1e9, 100.0
    _record(recorder, row, copy.sample)
    print(f"copy: {row.gb_per_s:.0f} GB/s, read plus written")
    if not run.dry:
        gap = measured.launch_gap(repeats)
        _record(recorder, Row("torch", "launch gap", "", "1", "fp32"), gap)
        print(f"launch gap in a CUDA graph: {gap.median:.2f} us")
    rows, dtype, name = (64, torch.float32, "fp32") if run.dry else (16384, torch.float16, "fp16")
    for product in measured.product_rates(run.device, rows, dtype, repeats):
        shape = f"{product.rows}x{product.inner}x{product.columns}"
        row = Row("torch", "matmul", "forward", shape, name, clock=clock, cache="warm")
        row.tflop_per_s = product.flop_per_s / 1e12
        if not run.dry:
            run.flop_per_s = max(run.flop_per_s or 0.0, product.flop_per_s)
        _record(recorder, row, product.sample)
        print(f"matmul {shape} {name}: {row.tflop_per_s:.3g} TFLOP/s")
    return copy


def _record(recorder, row, sample) -> None:
    row.median_us, row.p20_us, row.p80_us = sample.median, sample.p20, sample.p80
    recorder.add(row)


def op_times(run: Run, recorder, copy) -> None:
    """Every op against its alternatives, each checked in this run before it is timed."""
    from bertfast import ops
    from bertfast.bench import cases
    from bertfast.bench.measure import Bench

    for op, backends in ops.available(run.device).items():
        for backend, reason in backends.items():
            if reason:
                run.left_out.append(f"{op} on {backend}: {reason}")
    bench = Bench(
        run.device,
        recorder,
        copy,
        repeats=3 if run.dry else 15,
        out_of_time=run.over,
        flop_per_s=run.flop_per_s,
        compile_backend="aot_eager" if run.dry else "inductor",
    )
    todo = cases.dry_cases() if run.dry else cases.all_cases()
    done = 0
    for case in todo:
        if run.over():
            break
        bench.measure(case)
        done += 1
    print(f"{done} of {len(todo)} cases measured, {len(bench.refused)} providers refused")
    if done < len(todo):
        run.left_out.append(f"{len(todo) - done} of {len(todo)} cases: the time was over")
    run.faults += bench.refused


def summary(run: Run, rows: list) -> str:
    """One line a case: each provider's median, ours with the percentage of copy bandwidth."""
    lines: dict[tuple, dict[str, str]] = {}
    timed = [row for row in rows if row.median_us is not None and row.provider != "torch"]
    for row in timed:
        if row.clock == run_clock(run):
            key = (row.op, row.pass_, row.shape, row.dtype, f"p={row.dropout:g}")
            share = f" {row.percent_of_floor:.0f}%" if row.percent_of_floor is not None else ""
            lines.setdefault(key, {})[row.provider] = f"{row.median_us:.1f}{share}"
    providers = list(dict.fromkeys(row.provider for row in timed))
    heading = f"{'us, % of the floor':44}" + "".join(f"{name:>17}" for name in providers)
    text = [heading] if lines else ["nothing was timed"]
    for key, found in lines.items():
        cells = "".join(f"{found.get(name, '-'):>17}" for name in providers)
        text.append(f"{' '.join(key):44}{cells}")
    text += [f"left out: {line}" for line in run.left_out]
    text += [f"FAULT: {line}" for line in run.faults]
    return "\n".join(text)


def run_clock(run: Run) -> str:
    return "host" if run.dry else "device"


def attempt(run: Run, step: Callable, *args):
    """A step's result. What goes wrong in it is recorded, and the run goes on."""
    if run.over():
        run.left_out.append(f"{step.__name__}: the time was over")
        return None
    print(f"\n== {step.__name__}", flush=True)
    try:
        return step(run, *args)
    except Exception as error:
        run.faults.append(f"{step.__name__}: {type(error).__name__}: {error}")
        print(run.faults[-1])
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    import torch

    dry = options.dry_run or not torch.cuda.is_available()
    if dry and not options.dry_run:
        print("torch finds no GPU here: this is a dry run, and its times mean nothing")
    # Triton reads it at import; a GPU machine compiles.
    os.environ["TRITON_INTERPRET"] = "1" if dry else "0"
    from bertfast.bench import record

    if dry:
        torch.set_num_threads(1)  # threads that wait for each other would be all one sees
    environment = record.environment("cpu" if dry else "cuda")
    out = options.out
    if out is None:
        name = "".join(c if c.isalnum() else "-" for c in environment.device.lower())
        out = Path(tempfile.mkdtemp()) if dry else ROOT / "benchmarks" / "results" / name
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    seconds = 60 * options.minutes
    run = Run(out, dry, start + seconds, seconds)
    facts = asdict(environment)
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    (out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    recorder = record.Recorder(out / ("dry-run.csv" if dry else "results.csv"), environment)

    attempt(run, build)
    attempt(run, tests)
    copy = attempt(run, ceilings, recorder)
    if copy is not None:
        attempt(run, op_times, recorder, copy)
    text = summary(run, recorder.rows)
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n\n{len(recorder.rows)} rows in {recorder.path}")
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
