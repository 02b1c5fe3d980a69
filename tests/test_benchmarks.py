"""benchmarks/run_all.py on a CPU, and the rules of bertfast.commands.bench."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import simulated_gpu

from bertfast.commands import errors
from bertfast.commands.bench import case as protocol
from bertfast.commands.bench import cases, ceilings, harness, op_case, record, timing
from bertfast.commands.bench.cases.bias_gelu import BiasGeluCase
from bertfast.commands.bench.cases.gated import GatedCase
from bertfast.commands.bench.cases.layer_norm import LayerNormCase, WithSum
from bertfast.commands.bench.providers import Provider
from bertfast.ops import available, dispatch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "run_all.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks/ is not here")


def run_all(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """Of the tests, all of which are being run here, it collects few."""
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), *arguments]
    env = os.environ | {"PYTEST_ADDOPTS": "--ignore-glob=*/test_[!g]*"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=out, env=env)
    with (out / "dry-run.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert tuple(reader.fieldnames) == record.COLUMNS
    return result, rows


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("dry"))


def test_dry_run_goes_through_every_step(dry_run):
    result, rows = dry_run
    assert result.returncode == 0, result.stdout + result.stderr
    for step in ("build", "tests", "ceilings", "measurements"):
        assert f"== {step}" in result.stdout
    assert int(re.search(r"^tests only collected: (\d+) tests", result.stdout, re.M)[1]) > 100
    ops = {"copy", "matmul", "layer_norm", "bias_gelu", "attention_qkv", "linear_gelu"}
    ops |= {"linear_cross_entropy", "linear_log1p_max", "gated", "linear_gated"}
    assert ops | {"tiny", "tiny layer", "tiny layer attention"} <= {row["op"] for row in rows}
    for phase in ("ops", "layers", "models", "mixes", "latency", "compilers", "autotune"):
        done, total = re.search(rf"^{phase}: (\d+) of (\d+) cases", result.stdout, re.M).groups()
        assert done == total != "0"


def test_dry_run_times_every_provider_in_every_pass(dry_run):
    _, rows = dry_run
    for op, pass_ in dict.fromkeys((case.op, case.pass_) for case in cases.dry_cases()):
        # The script runs Triton in its interpreter, whatever this process does.
        providers = {"bertfast torch", "bertfast triton"}
        if available("cpu")[op]["cuda"] is None:
            providers.add("bertfast cuda")
        if op in ("linear_gelu", "linear_gated") and pass_ != "backward":
            providers.add("bertfast auto")
        if op.startswith("attention"):
            providers |= {"torch sdpa", "torch sdpa math"}
        else:
            providers |= {"torch eager", "torch compile"}
        timed = [row for row in rows if row["op"] == op and row["pass"] == pass_]
        assert {row["provider"] for row in timed} == providers
        for row in timed:
            assert float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
            assert float(row["error"]) < 0.02
            assert row["device"].startswith("cpu: ") and row["bertfast_commit"] and row["time"]


def test_time_limit_ends_cleanly_and_keeps_the_header(tmp_path):
    result, rows = run_all(tmp_path, "--minutes", "0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert rows == []
    assert "left out: ceilings: the time was over" in result.stdout


@pytest.fixture
def bench(tmp_path):
    recorder = record.Recorder(tmp_path / "rows.csv", record.environment("cpu"))
    machine = ceilings.Machine("cpu", lambda row: None, quick=True)
    return harness.Bench(machine, recorder, repeats=2)


CASE = LayerNormCase("backward", 5, 32, torch.float32)
STOCK = CASE.functions["torch eager"]


def provider(name, function):
    return Provider(name, "", ("op",), lambda case, inputs, setting: function)


def test_a_wrong_provider_is_not_timed(bench):
    def wrong(x, **more):
        return STOCK(x, **more) + 1e-3 * x

    def broken(**inputs):
        raise RuntimeError("no such kernel")

    functions = {"torch wrong": wrong, "torch broken": broken, "torch eager": STOCK}
    bench.measure(CASE, [provider(name, function) for name, function in functions.items()])
    rows = {row.provider: row for row in bench.recorder.rows}
    assert rows["torch wrong"].median_us is None and rows["torch wrong"].error is None
    assert rows["torch wrong"].note.startswith("not timed, wrong: Wrong: relative error")
    assert rows["torch broken"].note == "not timed: RuntimeError: no such kernel"
    assert rows["torch eager"].median_us > 0
    assert [line.split()[1] for line in bench.faults] == ["wrong"]
    assert [line.partition(",")[0] for line in bench.left_out] == ["torch broken"]


def test_a_nan_is_wrong():
    nan, one = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    assert protocol.relative(nan, one) == float("inf")
    assert protocol.relative(one[:1], one) == float("inf")
    assert protocol.relative(one, one) == 0.0
    with pytest.raises(protocol.Wrong, match="relative error nan is above 1"):
        protocol.held(float("nan"), 1.0)


@pytest.mark.parametrize("place", range(2))
def test_a_nan_in_any_output_is_wrong(bench, place):
    class Spoilt(BiasGeluCase):
        def step(self, runner, inputs):
            outputs = list(super().step(runner, inputs)())
            if runner is spoilt:
                outputs[place] = outputs[place] * float("nan")
            return lambda: tuple(outputs)

    def spoilt(**tensors):
        return BiasGeluCase.functions["torch eager"](**tensors)

    case = Spoilt("backward", 5, 32, torch.float32)
    bench.measure(case, [provider("torch spoilt", spoilt)])
    assert "relative error inf is above" in bench.recorder.rows[0].note


def test_ours_must_meet_the_error_budget(bench, monkeypatch):
    monkeypatch.setattr(op_case, "LIMITS", {torch.float32: float("inf")})

    def over_budget(*args):
        raise protocol.Wrong("y: max error 1 of 0.1 allowed")

    monkeypatch.setattr(op_case, "within_budget", over_budget)
    bench.measure(CASE, [provider("bertfast cuda", CASE.functions["bertfast"]("torch"))])
    assert bench.recorder.rows[0].median_us is None
    assert "max error 1" in bench.recorder.rows[0].note


def test_budget_check_accepts_the_reference():
    for case in (
        LayerNormCase("training", 5, 64, torch.float32, 0.1),
        LayerNormCase("training", 5, 64, torch.float32, alone=True),
        BiasGeluCase("backward", 5, 64, torch.float32),
    ):
        op_case.within_budget(case.op, "torch", case.for_budget(), case.dtype, "cpu")


def test_rows_survive_a_run_that_is_cut_short(bench):
    bench.measure(CASE, [provider("torch eager", STOCK)])
    with bench.recorder.path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["provider"] == "torch eager" and row["shape"] == "5x32"
    assert float(row["percent_of_floor"]) > 0


TOY = """
from dataclasses import dataclass

import torch

from bertfast.commands.bench.case import normal
from bertfast.commands.bench.floor import Work
from bertfast.commands.bench.op_case import Inputs, OpCase


@dataclass(frozen=True)
class ToyCase(OpCase):
    pass_: str
    width: int
    dtype = torch.float32
    dropout = 0.0

    op = "toy"
    functions = {"torch eager": torch.sin}
    shape = property(lambda self: str(self.width))

    def work(self):
        return [Work("memory", 0, 8 * self.width)]

    def inputs(self, device, seed):
        values = normal(device, seed, self.dtype)
        return Inputs({"input": values(self.width)}, values(self.width))


def gpu_cases():
    return [ToyCase("forward", 64), ToyCase("backward", 64)]


cpu_cases = dry_cases = gpu_cases
"""


def test_an_ops_cases_are_found_by_their_being_there(bench, tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(cases, "__path__", [*cases.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, f"{cases.__name__}.toy", None)
    del sys.modules[f"{cases.__name__}.toy"]
    for listed in (cases.gpu_cases, cases.cpu_cases, cases.dry_cases):
        toys = [case for case in listed() if case.op == "toy"]
        assert [case.pass_ for case in toys] == ["forward", "backward"]
    bench.slow = False
    for case in toys:
        bench.measure(case)
    assert {row.provider for row in bench.recorder.rows} == {"torch eager"}
    assert len(bench.recorder.rows) == 2 and bench.faults == []


@pytest.mark.parametrize(
    "pass_, dropout, values, statistics, parameters",
    [
        ("forward", False, 3, 0, 3),
        ("training", True, 4, 2, 3),
        ("backward", False, 3, 2, 4),
        ("backward", True, 4, 2, 4),
        ("forward", None, 2, 0, 2),
        ("training", None, 2, 2, 2),
        ("backward", None, 3, 2, 3),
    ],
)
def test_bytes(pass_, dropout, values, statistics, parameters):
    expected = values * 10 * 32 * 2 + statistics * 10 * 4 + parameters * 32 * 2
    # weight, bias, x_bias in; in the backward weight in and three gradients out; None: alone
    p = 0.1 if dropout else 0.0
    case = LayerNormCase(pass_, 10, 32, torch.float16, p, alone=dropout is None)
    assert [work.bytes for work in case.work()] == [expected]


@pytest.mark.parametrize(
    "pass_, form, values, statistics, parameters",
    [
        ("forward", {}, 4, 0, 3),
        ("training", {}, 4, 2, 3),
        ("backward", {}, 4, 2, 4),
        ("forward", {"bias": False}, 4, 0, 2),
        ("backward", {"bias": False}, 4, 2, 3),
        ("backward", {"rms": True}, 4, 1, 3),
    ],
)
def test_bytes_with_the_sum(pass_, form, values, statistics, parameters):
    case = WithSum(pass_, 10, 32, torch.float16, **form)
    expected = values * 10 * 32 * 2 + statistics * 10 * 4 + parameters * 32 * 2
    assert [work.bytes for work in case.work()] == [expected]
    inputs = case.inputs("cpu", 0)
    read = case.functions["torch eager"], case.functions["bertfast"]("torch")
    one, other = (case.step(function, inputs.double())() for function in read)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bytes_of_bias_gelu():
    def moved(pass_, dtype):
        return [work.bytes for work in BiasGeluCase(pass_, 10, 32, dtype).work()]

    assert moved("forward", torch.float16) == [(2 * 10 + 1) * 32 * 2]
    assert moved("backward", torch.float32) == [(3 * 10 + 2) * 32 * 4]


def test_bytes_of_gated():
    def moved(pass_, dtype):
        return [work.bytes for work in GatedCase(pass_, 10, 32, dtype).work()]

    assert moved("forward", torch.float16) == [3 * 10 * 32 * 2]
    assert moved("backward", torch.float32) == [5 * 10 * 32 * 4]


def test_providers_take_turns_and_stop_in_time():
    order = []
    timers = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    samples = timing.interleaved(timers, 2)
    assert order == ["a", "b", "a", "b"]
    assert samples["a"].median == 2.0
    order.clear()
    timing.interleaved(timers, 5, out_of_time=lambda: True)
    assert order == ["a", "b"]


def test_latencies_are_of_single_calls(monkeypatch):
    """In turns; a slow call is seen at the 99th percentile and not in the median."""
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name, us):
        def run():
            calls.append(name)
            now[0] += (50 * us if len(calls) % 40 == 0 else us) / 1e6

        return run

    found = timing.latencies({"a": call("a", 100), "b": call("b", 300)})
    assert {name: len(times) for name, times in found.items()} == {"a": 1000, "b": 1000}
    assert calls[:200] == ["a"] * 100 + ["b"] * 100
    assert timing.summarize(found["a"]).median == pytest.approx(100)
    assert timing.p99(found["a"]) == pytest.approx(5000)
    assert timing.p99([1.0]) == 1.0
    slow = timing.latencies({"a": call("a", 200_000)}, gpu=False)
    assert len(slow["a"]) < 1000
    assert len(timing.latencies({"a": call("a", 1)}, lambda: True)["a"]) == 100


def test_the_package_measures_without_a_gpu_or_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from bertfast.commands.bench import cases, harness"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def load(name):
    path = SCRIPT.with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_op_has_cases_and_its_calls_overhead_is_measured():
    pytest.importorskip("bertfast._host")
    suite = load("bench_overhead")
    assert {case.op for case in suite.CASES} == set(available("cpu"))

    def benchmark(step, **options):
        assert all(output.numel() for output in step())

    benchmark.pedantic = benchmark
    for case in suite.CASES:
        # Without CUDA kernels there is a reason, and nothing to measure.
        fused = dispatch.unsupported_reason(case.op, "cuda", "cpu", *case.form) is None
        for who in ("fused", "stock") if fused else ("stock",):
            suite.test_call(benchmark, case, who)


# Of stock's host time a layer, at most. Measured on an idle machine: see benchmarks/results.
MOST_HOST_TIME = {"inference": 2.2, "training": 1.8}


def test_host_time_is_a_share_of_stocks(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("bertfast._host")
    pytest.importorskip("triton")
    path = tmp_path / "host-time.json"
    # Without the interpreter: Triton's launches go to the mock driver.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT.with_name("host_time.py")), "--repeats", "15"]
    command += ["--out", str(path)]
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert said.returncode == 0, said.stderr
    assert said.stdout.endswith(f"{path}\n")
    found = json.loads(path.read_text())
    assert found["device"].startswith("cpu: ") and found["bertfast_commit"]
    for mode, most in MOST_HOST_TIME.items():
        assert found[mode]["HF SDPA"]["of HF SDPA"] == 1.0
        assert all(row["us"] > 0 for row in found[mode].values())
        for name in ("bertfast", "bertfast, Triton", "bertfast.nn.EncoderLayer"):
            assert found[mode][name]["of HF SDPA"] < most, (mode, name)
        for name in ("bertfast", "bertfast, Triton"):
            assert found[f"{mode}, in a model"][name]["of HF SDPA"] < most, (mode, name)


# Microseconds of twelve layers: measured 68 and 231 on a machine with other work.
MOST_OF_A_REPLAY = {"1 sequence": 250, "32 sequences": 900}


def test_host_time_of_a_replay(tmp_path):
    pytest.importorskip("transformers")
    if (reason := simulated_gpu.why_not()) is not None:
        pytest.skip(reason)
    path = tmp_path / "replay.json"
    command = [sys.executable, str(SCRIPT.with_name("graph_host_time.py")), "--repeats", "50"]
    said = subprocess.run(
        [*command, "--out", str(path)], capture_output=True, text=True, timeout=240
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(path.read_text())
    for start, most in MOST_OF_A_REPLAY.items():
        (parts,) = (value for name, value in found.items() if name.startswith(start))
        assert 0 < parts["sum"] < most and parts["weights, copies, launch, unpacking"] > 0


def test_the_readme_quotes_the_host_time_of_a_replay():
    (path,) = (ROOT / "benchmarks" / "results").glob("graph-host-time-*.json")
    found = json.loads(path.read_text())
    one, many = (
        next(parts["sum"] for name, parts in found.items() if name.startswith(start))
        for start in MOST_OF_A_REPLAY
    )
    said = f"takes {one:.0f} us of the host without a mask, and {many:.0f} us with 32 sequences"
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_a_masked_lm_loss_alone(capsys):
    """A step by each, as its process prints it: one loss, and ours without all tokens' logits."""
    suite = load("masked_lm_loss")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("it needs Linux's /proc")
    steps = {}
    for name in suite.PROVIDERS:
        sizes = ["--sizes", "4000", "16", "3000"]
        assert suite.main(["--alone", name, "--share", "0.15", *sizes]) == 0
        steps[name] = json.loads(capsys.readouterr().out)
    for seconds, _, loss in steps.values():
        assert seconds > 0 and loss == pytest.approx(steps["bertfast"][2], rel=1e-5)
    logits = 4000 * 3000 * 4 / 2**20
    assert steps[suite.STOCK][1] > logits > 2 * steps["bertfast"][1]


def test_a_checkout_beside_itself(tmp_path):
    pytest.importorskip("transformers")
    arguments = ["--repeats", "1", "--only", "bias_gelu 1024x1536"]
    command = [sys.executable, str(SCRIPT.with_name("side_by_side.py")), str(ROOT), *arguments]
    said = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    heading, *lines = said.stdout.splitlines()
    assert heading.startswith("times as fast")
    (line,) = lines
    ratio, _, _, old, new, name = line.split(maxsplit=5)
    assert float(ratio) > 0 and float(old) > 0 and float(new) > 0
    assert name == "bias_gelu 1024x1536, forward"
    command[2] = str(tmp_path)  # no checkout: what is installed must not stand for it
    said = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert said.returncode == 1 and "was imported instead of" in said.stderr


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("bertfast_run_all", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_what_a_run_needs_is_told_before_it_starts(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "missing", lambda modules: [m for m in modules if m == "pytest"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert script.main(["--dry-run", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("run_all.py needs pytest: pip install ") and "[test]" in said.err
    assert said.err.count("\n") == 1 and said.out == "" and not (tmp_path / "out").exists()


def test_every_option_has_a_help_text(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    said = capsys.readouterr().out
    for option in ("--minutes MINUTES", "--dry-run", "--out OUT"):
        assert re.search(rf"{option} +[a-z]", said)


def test_a_case_that_raises_does_not_end_the_run(script, tmp_path):
    measured = []

    def measure(case):
        if not measured:
            measured.append(None)
            raise MemoryError("too large")
        measured.append(case)

    run = script.Run(tmp_path, True, time.monotonic() + 60, 60.0)
    phase = script.Phase("models", 1.0, [CASE, CASE], measure)
    phase.go(run, 1.0)
    assert measured == [None, CASE] and phase.done == 2 and phase.todo == []
    assert run.faults == ["models 5x32: MemoryError: too large"]
    # With too little time left nothing is begun; with its share used up, one case and no more.
    late = script.Phase("autotune", 1.0, [CASE], measure, least=100.0)
    late.go(run, 1.0)
    assert late.todo == [CASE]
    rest = script.Phase("ops", 0.0, [CASE, CASE], measure)
    rest.go(run, 0.0)
    assert rest.done == 1
