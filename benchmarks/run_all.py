"""Everything that a machine can tell about bertfast's speed, in one command.

    python benchmarks/run_all.py [--out DIR] [--minutes 9] [--dry-run]

On a GPU machine with torch, triton, transformers, nvcc, pybind11, ninja and pytest, without network
and without bertfast installed: builds the extension in place for that GPU, runs the tests that need
it, chooses backends and splits (DIR/tuned.json, for all that follows), and measures ceilings,
ops, layers, models, length mixes and latency. Each of these has a share of the time and takes its
most important cases first; what was left goes on once all had theirs, and the compilers, which take
longest, come last. An op's cases take turns with the other ops', those of attention by position
(rotary, a window, a bias) as if they were an op: however long they take, the first of every op come
before their second. Rows go into DIR/results.csv as they are known, and a run that reaches its time
limit ends cleanly. Exit status 1 if a step failed or a number is wrong.

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


# Shares of the whole time, and ends of the further ones.
TESTS = 0.2
TUNING = 0.12
UNTIL = {
    "ops": 0.45,
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
    "1x20": (1, 20),
    "8x128": (8, 128),
    "32x128": (32, 128),
    "32x512": (32, 512),
    "64x384": (64, 384),
}
MIXES = ("squad", "queries", "wikipedia", "passages")
# A model's compilation may take this many seconds, autotuning more: with less left none is begun.
COMPILES = {"compilers": 60.0, "autotune": 100.0}
COMPILED = {
    "compilers": ("bertfast", "HF SDPA", "torch compile"),
    "autotune": (
        *("bertfast graph", "HF SDPA graph", "torch compile max"),
        *("bertfast triton", "bertfast cuda", "bertfast two kernels", "torch eager"),
    ),
}


@dataclass
class Run:
    """State that the steps share."""

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
    """Looks at whether the build could run: setup.py answers, and which compilers it would find."""
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


def tune(run: Run) -> None:
    """The fastest backends and splits here, which all that is measured after it uses. The file
    comes back with the results."""
    from bertfast.ops import tuned

    file = run.out / "tuned.json"
    if run.dry:
        print("not tuned: that needs a GPU")
        return
    minutes = max(0.2, min(run.left(), TUNING * run.seconds) / 60)
    command = [sys.executable, "-m", "bertfast", "tune", "--minutes", f"{minutes:.2f}"]
    os.environ[tuned.VARIABLE] = str(file)
    status = run.command(command, "tune.log", 60 * minutes + 30)
    tuned.forget()
    print(run.tail("tune.log", 40))
    if status != 0:
        run.faults.append(f"bertfast tune: exit status {status}; see tune.log")


def ceilings(run: Run, recorder):
    """Copy bandwidth, launch gap and matrix products: what the floors are made of."""
    import torch

    from bertfast.commands.bench import tables
    from bertfast.commands.bench.ceilings import Machine

    machine = Machine(run.device, recorder.add, quick=run.dry)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        machine.ceilings(dtype)
    print("\n".join(tables.ceilings(recorder.rows)))
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


def plan(dry: bool) -> dict[str, list]:
    """The cases of each phase, most important first. Dry, every model and batch is tiny, and what
    has become the same is measured once."""
    import torch

    from bertfast.commands.bench import cases, models
    from bertfast.commands.bench.encoder import cases as encoders

    base, large, mini = models.MODELS.values()
    shapes = {name: models.full_batch(*size) for name, size in SHAPES.items()}
    mixes = {name: models.mixed_batch(name, 64) for name in MIXES}
    bf16, fp16 = [torch.bfloat16], [torch.float16]
    if dry:
        base = large = mini = models.Model("tiny", 32, 64, 2, 2)
        shapes = dict.fromkeys(shapes, models.full_batch(1, 12))
        mixes = dict.fromkeys(mixes, models.mixed_batch("queries", 4))
        fp16 = bf16
    long, short, one = shapes["32x512"], shapes["32x128"], shapes["1x128"]
    both, forward, latency = ("forward", "forward+backward"), ("forward",), ("latency",)
    squad, queries, wikipedia, passages = mixes.values()
    ops = cases.dry_cases() if dry else cases.gpu_cases()
    found = {
        "ops": ops,
        "layers": [
            *encoders([base], [long, short, shapes["64x384"]], both, bf16, layer=True),
            *encoders([large, mini], [long, short], both, bf16, layer=True),
        ],
        "models": [
            *encoders([base], [long, short, shapes["8x128"]], both, bf16),
            *encoders([large], [shapes["64x384"], short], both, bf16),
            *encoders([mini], [shapes["64x384"], short], both, bf16),
            *encoders([base], [shapes["64x384"]], both, [*bf16, *fp16]),
        ],
        "mixes": [
            *encoders([base], [squad, queries, wikipedia, passages], both, bf16),
            *encoders([large, mini], [squad, queries], both, bf16),
        ],
        "latency": [
            *encoders([base, mini, large], [one], latency, bf16),
            *encoders([base], [shapes["1x20"]], latency, bf16),
        ],
        "compilers": [
            *encoders([base], [long, squad], forward, bf16),
            *encoders([base], [long], both[1:], bf16),
        ],
        "autotune": [
            *encoders([base], [one], latency, bf16),
            *encoders([base], [long], forward, bf16),
            *[case for case in ops if case.op == "linear_gelu"][:1],
        ],
    }
    return {name: list(dict.fromkeys(todo)) for name, todo in found.items()}


def phases(run: Run, recorder, machine) -> tuple[list[Phase], list]:
    """The phases, and the benches that measure them."""
    from bertfast.commands.bench.harness import Bench
    from bertfast.commands.bench.parts import measure_parts

    options = dict(
        repeats=3 if run.dry else 9,
        out_of_time=run.over,
        compile_backend="aot_eager" if run.dry else "inductor",
        say=print,
    )
    quick = Bench(machine, recorder, slow=False, **options)
    benches = {"ops": Bench(machine, recorder, **options)}
    for name, wanted in COMPILED.items():
        benches[name] = Bench(machine, recorder, wanted=wanted, **options)

    def layer(case) -> None:
        quick.measure(case)
        if case.pass_ == "forward":
            measure_parts(machine, recorder, case)

    measures = {name: bench.measure for name, bench in benches.items()} | {"layers": layer}
    found = []
    for name, todo in plan(run.dry).items():
        least = 0.0 if run.dry else COMPILES.get(name, 0.0)
        found.append(Phase(name, UNTIL[name], todo, measures.get(name, quick.measure), least))
    return found, [quick, *benches.values()]


def measurements(run: Run, recorder, machine) -> None:
    """Each phase in its share of the time, then what was left of each, in turns."""
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
    for bench in benches:
        run.faults += bench.faults
        run.left_out += [line for line in bench.left_out if line not in run.left_out]


def summary(run: Run, rows: list) -> str:
    """The tables of everything that was timed, and what wasn't."""
    from bertfast.commands.bench.tables import everything

    text = [line for line, _ in everything(rows)]
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
    from bertfast.testing import interpreter

    try:
        check_needs(dry)
        if options.out is not None:
            writable_directory("--out", options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if dry:
        torch.set_num_threads(1)  # threads that wait for each other would be all one sees
        if importlib.util.find_spec("triton"):
            interpreter.quicken()
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
    attempt(run, tune)
    machine = attempt(run, ceilings, recorder)
    if machine is not None:
        attempt(run, measurements, recorder, machine)
    text = summary(run, recorder.rows)
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n\n{len(recorder.rows)} rows in {recorder.path}")
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
