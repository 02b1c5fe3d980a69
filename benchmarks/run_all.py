"""Everything that a machine can tell about bertfast's speed, in one command.

    python benchmarks/run_all.py [--out DIR] [--minutes 9] [--dry-run]

On a GPU machine with torch, triton, transformers, nvcc, pybind11, ninja and pytest, without network
and without bertfast installed: builds the extension in place for that GPU, runs the tests that need
it, and measures ceilings, ops, layers, models, length mixes and latency. Each of these has a share
of the time and takes its most important cases first; what was left goes on once all had theirs, and
the compilers, which take longest, come last. Rows go into DIR/results.csv as they are known, and a
run that reaches its time limit ends cleanly. Exit status 1 if a step failed or a number is wrong.

--dry-run goes through every step on a CPU in a minute: the build is only looked at, the tests are
only collected, tiny shapes are timed, and the rows go into DIR/dry-run.csv. Without a GPU that is
what happens in any case.
"""

import argparse
import importlib.util
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


# Ends of the shares of the whole time.
TESTS = 0.2
UNTIL = {
    "ops": 0.42,
    "layers": 0.5,
    "models": 0.6,
    "mixes": 0.68,
    "latency": 0.72,
    "compilers": 0.85,
    "autotune": 1.0,
}
BUILD_NEEDS = ("setuptools", "pybind11", "ninja")
SHAPES = {
    "1x128": (1, 128),
    "8x128": (8, 128),
    "32x128": (32, 128),
    "32x512": (32, 512),
    "64x384": (64, 384),
}
# A model's compilation may take this many seconds, autotuning more: with less left none is begun.
COMPILES = {"compilers": 60.0, "autotune": 100.0}
COMPILED = {
    "compilers": ("bertfast", "HF SDPA", "torch compile"),
    "autotune": ("bertfast graph", "HF SDPA graph", "torch compile max"),
}


@dataclass
class Run:
    """What the steps share."""

    out: Path
    dry: bool
    end: float  # on time.monotonic's clock
    seconds: float
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

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
    """Those that need a GPU, with a share of the time. CI runs the others, without one."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if run.dry:
        status = run.command([*pytest, "--collect-only"], "tests.log", 90)
        print(f"tests only collected: {run.tail('tests.log', 1)}")
        if status not in (0, 5):
            run.faults.append(f"pytest could not collect (exit status {status}); see tests.log")
        return
    command = [*pytest, "-m", "gpu", f"--junitxml={run.out / 'tests-gpu.xml'}"]
    status = run.command(command, "tests-gpu.log", min(run.left(), TESTS * run.seconds))
    if status is None:
        run.left_out.append("tests-gpu: the rest of it, its share of the time was over")
    elif status not in (0, 5):  # 5: no test has these marks
        run.faults.append(f"tests-gpu: exit status {status}; see tests-gpu.log")
    print(f"tests-gpu: {run.tail('tests-gpu.log', 1 if status in (0, 5) else 12)}")


def ceilings(run: Run, recorder):
    """Copy bandwidth, launch gap and matrix products: what the floors are made of."""
    import torch

    from bertfast.commands.bench.ceilings import Machine

    machine = Machine(run.device, recorder.add, quick=run.dry)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        machine.ceilings(dtype)
    for row in recorder.rows:
        rate = f"{row.gb_per_s:.0f} GB/s" if row.gb_per_s else f"{row.median_us:.2f} us"
        rate = f"{row.tflop_per_s:.3g} TFLOP/s" if row.tflop_per_s else rate
        print(f"{row.op} {row.shape} {row.dtype}: {rate}")
    return machine


@dataclass
class Phase:
    """Cases of one kind, and the share of the whole time at whose end it makes room."""

    name: str
    until: float
    todo: list
    measure: Callable
    least: float = 0.0  # seconds that must be left to begin a case
    done: int = 0

    def go(self, run: Run, until: float) -> None:
        """Measures cases until then, at least one if there is any time."""
        end = run.end - (1 - until) * run.seconds
        first = True
        while self.todo and run.left() > self.least and (first or time.monotonic() < end):
            first = False
            case = self.todo.pop(0)
            print(f"{self.name}: {case.op} {case.pass_} {case.shape}", flush=True)
            try:
                self.measure(case)
            except Exception as error:  # out of memory, say: the other cases are still worth it
                run.faults.append(
                    f"{self.name} {case.shape}: {type(error).__name__}: {error}"[:300]
                )
            self.done += 1


def phases(run: Run, recorder, machine) -> tuple[list[Phase], list]:
    """What is measured, and by whom."""
    import torch

    from bertfast.commands.bench import cases, encoder, models, parts
    from bertfast.commands.bench.measure import Bench

    options = dict(
        repeats=3 if run.dry else 9,
        out_of_time=run.over,
        compile_backend="aot_eager" if run.dry else "inductor",
    )
    ops = Bench(machine, recorder, **options)
    eager = encoder.EncoderBench(machine, recorder, slow=False, **options)
    compiled = {
        name: encoder.EncoderBench(machine, recorder, providers=providers, slow=True, **options)
        for name, providers in COMPILED.items()
    }
    bf16, fp16 = torch.bfloat16, torch.float16

    def layer(case) -> None:
        eager.measure(case)
        if case.pass_ == "forward":
            parts.measure_parts(machine, recorder, case.model, case.tokens, case.dtype)

    if run.dry:
        tiny = models.Model("tiny", 32, 64, 2, 2)
        full, mixed = models.full_batch(1, 12), models.mixed_batch("queries", 4)
        both = ("forward", "forward+backward")
        many = {
            "ops": cases.dry_cases(),
            "layers": encoder.cases([tiny], [full], both, [bf16], layer=True),
            "models": encoder.cases([tiny], [full], both, [torch.float32]),
            "mixes": encoder.cases([tiny], [mixed], both, [torch.float32]),
            "latency": encoder.cases([tiny], [full], ["latency"], [torch.float32]),
            "compilers": encoder.cases([tiny], [full], ["forward"], [torch.float32]),
            "autotune": encoder.cases([tiny], [full], ["latency"], [torch.float32]),
        }
    else:
        base, large, mini = models.MODELS.values()
        shapes = {name: models.full_batch(*size) for name, size in SHAPES.items()}
        squad, queries, wikipedia, passages = (
            models.mixed_batch(name, 64) for name in ("squad", "queries", "wikipedia", "passages")
        )
        both = ("forward", "forward+backward")
        long, short = shapes["32x512"], shapes["32x128"]
        one = shapes["1x128"]
        many = {
            "ops": cases.all_cases(),
            "layers": [
                *encoder.cases([base], [long, short, shapes["64x384"]], both, [bf16], layer=True),
                *encoder.cases([large, mini], [long, short], both, [bf16], layer=True),
            ],
            "models": [
                *encoder.cases([base], [long, short, shapes["8x128"]], both, [bf16]),
                *encoder.cases([large], [shapes["64x384"], short], both, [bf16]),
                *encoder.cases([mini], [shapes["64x384"], short], both, [bf16]),
                *encoder.cases([base], [shapes["64x384"]], both, [bf16, fp16]),
            ],
            "mixes": [
                *encoder.cases([base], [squad, queries], both, [bf16]),
                *encoder.cases([base], [wikipedia, passages], both, [bf16]),
                *encoder.cases([large, mini], [squad, queries], both, [bf16]),
            ],
            "latency": [
                *encoder.cases([base, mini, large], [one], ["latency"], [bf16]),
                *encoder.cases([base], [models.full_batch(1, 20)], ["latency"], [bf16]),
            ],
            "compilers": [
                *encoder.cases([base], [long, squad], ["forward"], [bf16]),
                *encoder.cases([base], [long], ["forward+backward"], [bf16]),
            ],
            "autotune": [
                *encoder.cases([base], [one], ["latency"], [bf16]),
                *encoder.cases([base], [long], ["forward"], [bf16]),
            ],
        }
    measures = {"ops": ops.measure, "layers": layer}
    measures |= {name: bench.measure for name, bench in compiled.items()}
    found = [
        Phase(
            name,
            UNTIL[name],
            list(todo),
            measures.get(name, eager.measure),
            0.0 if run.dry else COMPILES.get(name, 0.0),
        )
        for name, todo in many.items()
    ]
    return found, [ops, eager, *compiled.values()]


def measurements(run: Run, recorder, machine) -> None:
    """Each phase in its share of the time, then what was left of each, in turns."""
    from bertfast import ops

    for op, backends in ops.available(run.device).items():
        for backend, reason in backends.items():
            if reason:
                run.left_out.append(f"{op} on {backend}: {reason}")
    todo, benches = phases(run, recorder, machine)
    if importlib.util.find_spec("transformers") is None:
        run.left_out.append("layers and models: transformers is not installed")
        todo = [phase for phase in todo if phase.name == "ops"]
    for phase in todo:
        phase.go(run, phase.until)
    while any(phase.todo and run.left() > phase.least for phase in todo):
        for phase in todo:
            phase.go(run, 0.0)  # one case
    for phase in todo:
        total = phase.done + len(phase.todo)
        print(f"{phase.name}: {phase.done} of {total} cases measured")
        if phase.todo:
            run.left_out.append(f"{len(phase.todo)} of {total} {phase.name}: the time was over")
    absent: dict[str, str] = {}
    for bench in benches:
        run.faults += bench.faults
        if isinstance(bench.left_out, dict):
            absent |= bench.left_out
        else:
            run.left_out += bench.left_out
    run.left_out += [f"{name}: {reason}" for name, reason in absent.items()]


def summary(run: Run, rows: list) -> str:
    """The tables of everything that was timed, and what wasn't."""
    from bertfast.commands.bench.compare import verdicts
    from bertfast.commands.bench.tables import by_op, legend, op_table

    text = []
    for op, cases in by_op(rows).items():
        text += [line for line, _ in op_table(op, cases).lines()]
        text += ["", *verdicts(cases), ""]
    text.append(legend() if text else "nothing was timed")
    text += [f"left out: {line}" for line in run.left_out]
    text += [f"FAULT: {line}" for line in run.faults]
    return "\n".join(text)


def check_needs(dry: bool) -> None:
    """Raises UserError, with the way to get it, where something is missing that a step needs."""
    from bertfast.commands.errors import UserError, install_hint, need
    from bertfast.commands.kernels.sass import MissingTool, tool

    need("run_all.py", ("pytest",) if dry else ("pytest", *BUILD_NEEDS), "test")
    if not dry:
        try:
            tool("nvcc")
        except MissingTool as missing:
            raise UserError(f"run_all.py builds the kernels, and {missing}") from None
    elif importlib.util.find_spec("bertfast._host") is None:
        print(f"bertfast._host isn't built, its kernels are left out: {install_hint('test')}")


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
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="the whole run ends after this many; default: 9"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="every step on a CPU in a minute, with tiny shapes"
    )
    options = parser.parse_args(arguments)
    start = time.monotonic()
    import torch

    dry = options.dry_run or not torch.cuda.is_available()
    if dry and not options.dry_run:
        print("torch finds no GPU here: this is a dry run, and its times mean nothing")
    # Triton reads it at import; a GPU machine compiles.
    os.environ["TRITON_INTERPRET"] = "1" if dry else "0"
    from bertfast.commands.bench import record
    from bertfast.commands.errors import UserError, writable_directory

    try:
        check_needs(dry)
        if options.out is not None:
            writable_directory("--out", options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
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
    machine = attempt(run, ceilings, recorder)
    if machine is not None:
        attempt(run, measurements, recorder, machine)
    text = summary(run, recorder.rows)
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n\n{len(recorder.rows)} rows in {recorder.path}")
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
