"""A new op is one folder with its kernels and one benchmark case: no list elsewhere is edited."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

import bertfast.ops
from bertfast.ops import dispatch

TOY = Path(__file__).parent / "data" / "toy"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """bertfast.ops.toy, from a folder outside the package, as if it lay in it."""
    shutil.copytree(TOY / "op", tmp_path / "ops" / "toy")
    monkeypatch.setattr(bertfast.ops, "__path__", [*bertfast.ops.__path__, str(tmp_path / "ops")])
    dispatch.ops.cache_clear()
    yield importlib.import_module("bertfast.ops.toy")  # once a process: torch keeps its ops
    dispatch.ops.cache_clear()


def test_it_is_an_op_like_the_others(toy):
    assert "toy" in bertfast.ops.available("cpu")
    reasons = bertfast.ops.available("cpu")["toy"]
    assert reasons["torch"] is None and reasons["cuda"] == "toy has no cuda kernels yet"
    with pytest.raises(ValueError, match="can't run toy here: toy has no cuda kernels yet"):
        toy.toy(torch.ones(3), backend="cuda")


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.triton)])
def test_its_numbers_and_its_derivative(toy, need, backend):
    if backend == "triton":
        need("toy", ("triton", "cpu"))
    x = torch.randn(5, 7, requires_grad=True)
    y = toy.toy(x, backend=backend)
    torch.testing.assert_close(y, 2 * x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


@pytest.mark.triton
def test_it_compiles_in_one_graph(toy, need):
    need("toy", ("triton", "cpu"))
    x = torch.randn(5, 7)
    compiled = torch.compile(lambda x: toy.toy(x, backend="triton") + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), 2 * x + 1)


def test_its_case_is_found_and_works(toy, tmp_path, monkeypatch):
    from bertfast.commands.bench import cases

    shutil.copy(TOY / "case.py", tmp_path / "toy.py")
    monkeypatch.setattr(cases, "__path__", [*cases.__path__, str(tmp_path)])
    (case,) = [case for case in cases.cpu_cases() if case.op == "toy"]
    inputs = case.inputs("cpu", seed=0)
    ours, stock = (function for function in case.functions.values())
    x = inputs.leaves["x"]
    torch.testing.assert_close(ours("auto")(x), stock(x))
    assert case.work()[0].bytes == 2 * 64 * 4
    del sys.modules["bertfast.commands.bench.cases.toy"]
