"""The commands, as a user runs them."""

import json
import os
import subprocess
import sys

import pytest

from bertfast import verify as verify_module


def bertfast(*arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "bertfast.cli", *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ, **(env or {})),
    )


def test_help_lists_the_commands():
    result = bertfast("--help")
    assert result.returncode == 0
    for command in ("env", "demo", "verify", "bench", "kernels"):
        assert command in result.stdout


def test_env_tells_what_works_and_why_not():
    result = bertfast("env", "--json", env={"TRITON_INTERPRET": "0"})
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    backends = facts["backends"]["cpu"]["layer_norm"]
    assert backends["torch"] is None
    assert "TRITON_INTERPRET=1" in backends["triton"] or "can't be imported" in backends["triton"]
    text = bertfast("env")
    assert text.returncode == 0
    assert "layer_norm" in text.stdout and facts["packages"]["torch"] in text.stdout


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


def test_bench_and_demo_hand_on_their_options():
    result = bertfast("bench", "model", "--pass", "sideways")
    assert result.returncode == 2
    assert "--pass must be of" in result.stderr or "transformers is missing" in result.stderr
    result = bertfast("demo", "--texts", "1")
    assert result.returncode == 2 and "--texts" in result.stderr


def test_verify_refuses_unknown_names():
    for arguments in (("--op", "softmax"), ("--backend", "cudnn")):
        result = bertfast("verify", *arguments)
        assert result.returncode == 2
        assert "expected one of" in result.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_reports_a_wrong_kernel(monkeypatch, capsys, as_json):
    """A backend whose statistics are off by 1 % is called wrong, by name, with exit code 1."""
    from bertfast.ops.layer_norm import reference

    real = reference.forward

    def wrong(x, weight, *rest):
        y = real(x, weight, *rest)
        return y if weight.dtype.itemsize == 8 else y * 1.01

    monkeypatch.setattr(reference, "forward", wrong)
    monkeypatch.setattr(
        verify_module,
        "_check_in_process",
        lambda op, backend, device: (verify_module.check(op, backend, device), None),
    )
    assert verify_module.verify("layer_norm", "torch", as_json) == 1
    said = capsys.readouterr().out
    assert '"ok": false' in said if as_json else "WRONG torch float32" in said


def test_verify_counts_a_crash_as_a_fault(monkeypatch, capsys):
    def crash(op, backend, device):
        raise RuntimeError("the kernel [crashed]")

    monkeypatch.setattr(verify_module, "_check_in_process", crash)
    assert verify_module.verify("layer_norm", "torch") == 1
    assert "the kernel [crashed]" in capsys.readouterr().out
