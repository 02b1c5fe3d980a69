"""benchmarks/run_all.py on a CPU, and the rules of bertfast.commands.bench."""

import csv
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bertfast.commands import errors
from bertfast.commands.bench import cases, ceilings, measure, record, timing
from bertfast.ops import available

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "run_all.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks/ is not here")


def run_all(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=out)
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
    ops = {"copy", "matmul", "layer_norm", "bias_gelu", "attention_qkv"}
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
    return measure.Bench(machine, recorder, repeats=2, say=lambda text: None)


CASE = cases.LayerNormCase("backward", 5, 32, torch.float32)


def test_a_wrong_provider_is_not_timed(bench):
    def wrong(x, weight, bias, residual, x_bias, seed, p):
        return cases._stock(x, weight, bias, residual, x_bias, seed, p) + 1e-3 * x

    def broken(**inputs):
        raise RuntimeError("no such kernel")

    right = {"torch eager": cases._stock}
    bench.measure(CASE, {"torch wrong": wrong, "torch broken": broken} | right)
    rows = {row.provider: row for row in bench.recorder.rows}
    assert rows["torch wrong"].median_us is None and rows["torch wrong"].error is None
    assert rows["torch wrong"].note.startswith("not timed, wrong: Wrong: relative error")
    assert rows["torch broken"].note == "not timed: RuntimeError: no such kernel"
    assert rows["torch eager"].median_us > 0
    assert [line.split()[1] for line in bench.faults] == ["wrong"]
    assert [line.split()[1] for line in bench.left_out] == ["broken"]


def test_a_nan_is_wrong():
    nan, one = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    assert measure.relative_error((nan, one), (one, one)) == float("inf")
    assert measure.relative_error((one, nan), (one, one)) == float("inf")
    assert measure.relative_error((one, one), (one, one)) == 0.0


def test_ours_must_meet_the_error_budget(bench, monkeypatch):
    monkeypatch.setattr(measure, "LIMITS", {torch.float32: float("inf")})

    def over_budget(*args):
        raise measure.Wrong("y: max error 1 of 0.1 allowed")

    monkeypatch.setattr(measure, "check_budget", over_budget)
    bench.measure(CASE, {"bertfast cuda": cases._ours("torch")})
    assert bench.recorder.rows[0].median_us is None
    assert "max error 1" in bench.recorder.rows[0].note


def test_budget_check_accepts_the_reference():
    for case in (
        cases.LayerNormCase("training", 5, 64, torch.float32, 0.1),
        cases.BiasGeluCase("backward", 5, 64, torch.float32),
    ):
        measure.check_budget(case, "torch", "cpu")


def test_rows_survive_a_run_that_is_cut_short(bench):
    bench.measure(CASE, {"torch eager": cases._stock})
    with bench.recorder.path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["provider"] == "torch eager" and row["shape"] == "5x32"
    assert float(row["percent_of_floor"]) > 0


@pytest.mark.parametrize(
    "pass_, dropout, values, statistics, parameters",
    [
        ("forward", False, 3, 0, 3),
        ("training", True, 4, 2, 3),
        ("backward", False, 3, 2, 4),
        ("backward", True, 4, 2, 4),
    ],
)
def test_bytes(pass_, dropout, values, statistics, parameters):
    expected = values * 10 * 32 * 2 + statistics * 10 * 4 + parameters * 32 * 2
    # weight, bias, x_bias in; in the backward weight in and three gradients out
    assert cases.layer_norm_bytes(pass_, 10, 32, 2, dropout) == expected


def test_bytes_of_bias_gelu():
    assert cases.bias_gelu_bytes("forward", 10, 32, 2) == (2 * 10 + 1) * 32 * 2
    assert cases.bias_gelu_bytes("backward", 10, 32, 4) == (3 * 10 + 2) * 32 * 4


def test_providers_take_turns_and_stop_in_time():
    order = []
    timers = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    samples = timing.interleaved(timers, 2)
    assert order == ["a", "b", "a", "b"]
    assert samples["a"].median == 2.0
    order.clear()
    timing.interleaved(timers, 5, out_of_time=lambda: True)
    assert order == ["a", "b"]


def test_the_package_measures_without_a_gpu_or_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from bertfast.commands.bench import cases, measure"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_overhead_suites_run_every_op():
    pytest.importorskip("bertfast._host")
    path = SCRIPT.with_name("bench_overhead.py")
    spec = importlib.util.spec_from_file_location("bench_overhead", path)
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    assert {op for case in suite.CASES for op in case.needs} == set(available("cpu"))
    suite.BACKEND = "torch"  # which every op has
    for kind in suite.CASES:
        case = kind()
        tensors = case.tensors()
        assert case.fused(*tensors).numel() == case.stock(*tensors).numel()


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
