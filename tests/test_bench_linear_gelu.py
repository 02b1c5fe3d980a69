"""linear_gelu as a case of `bertfast bench`: what is counted, what each provider is held to."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from bertfast.commands.bench import ceilings, op_case, providers, record
from bertfast.commands.bench.case import Setting, Wrong
from bertfast.commands.bench.cases import linear_gelu as cases
from bertfast.commands.bench.harness import Bench
from bertfast.ops import dispatch

HERE = Setting("cpu")
ROWS, WIDTH, INNER = 10, 32, 64


def made(pass_, dtype=torch.float32):
    return cases.case(pass_, ROWS, WIDTH, INNER, dtype)


def named(case, name):
    (found,) = (one for one in case.providers() if one.name == name)
    return found


@pytest.mark.parametrize(
    ("pass_", "wide", "vectors"), [("forward", 1, 1), ("training", 2, 1), ("backward", 2, 2)]
)
def test_work(pass_, wide, vectors):
    """x or dy, the weight; y, with u, or u and dv; bias, with its gradient."""
    (work,) = made(pass_, torch.float16).work()
    values = ROWS * WIDTH + WIDTH * INNER + wide * ROWS * INNER + vectors * INNER
    assert (work.kind, work.flops, work.bytes) == (
        "products",
        2 * ROWS * WIDTH * INNER,
        2 * values,
    )


def test_the_backward_is_the_forwards():
    """In float64: dv and dbias are the gradients of u + bias, where dy is that of y down^T."""
    case = made("backward")
    inputs = case.inputs("cpu", 3).double()
    dv, dbias = case.step(case.functions["exact"], inputs)()
    given = inputs.leaves
    v = (given["u"] + given["bias"]).requires_grad_()
    (right,) = torch.autograd.grad(F.linear(F.gelu(v), given["down"]), v, given["dy"])
    torch.testing.assert_close(dv, right)
    torch.testing.assert_close(dbias, right.sum(0))


@pytest.mark.parametrize("pass_", cases.PASSES)
def test_what_runs_on_a_cpu(pass_):
    case = made(pass_)
    inputs = case.inputs("cpu", 0)
    able = [one.name for one in case.providers() if one.why_not(case, HERE) is None]
    auto = [] if pass_ == "backward" else ["bertfast auto"]
    assert able == ["bertfast torch", *auto, "torch eager", "torch compile"]
    for name in able[:-1]:
        provider = named(case, name)
        runner = provider.make(case, inputs, HERE)
        assert 0 < case.check(provider, runner, inputs) < 1e-6
        (y, *_) = case.step(runner, inputs)()
        assert y.requires_grad == (pass_ == "training")


def test_why_the_others_do_not():
    case = made("training")
    reasons = {one.name: one.why_not(case, HERE) for one in case.providers()}
    for name in ("bertfast two kernels", "torch compile max", "quack", cases.TANH):
        assert reasons[name] == "it needs a GPU"
    saves = next(need for need in named(case, cases.TANH).needs if need is not providers.gpu)
    assert "saves nothing" in saves(case, HERE) and saves(made("forward"), HERE) is None


@pytest.mark.parametrize("wanted", [None, ["torch compile max", "torch eager"]])
def test_autotuning_waits_until_it_is_asked_for(wanted, monkeypatch):
    provider = named(made("forward"), "torch compile max")
    monkeypatch.setattr(type(provider), "why_not", lambda self, case, setting: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    machine = ceilings.Machine("cpu", lambda row: None, quick=True)
    bench = Bench(
        machine, record.Recorder(None, record.environment("cpu")), repeats=1, wanted=wanted
    )
    bench.measure(made("forward"), [provider])
    assert len(bench.recorder.rows) == (wanted is not None)
    why = "torch compile max: autotuning may take a minute a case: ask for it by --provider"
    assert bench.left_out == ([why] if wanted is None else [])


@pytest.mark.parametrize("pass_", cases.PASSES)
def test_two_kernels_are_held_to_the_budget(pass_, monkeypatch):
    """By bias_gelu's backend, whichever it is; torch's own composition needs none."""
    asked = []
    monkeypatch.setattr(op_case, "within_budget", lambda *args: asked.append(args[:3]))
    case = made(pass_, torch.float16)
    provider = named(case, "bertfast two kernels")
    inputs = case.inputs("cpu", 0)
    monkeypatch.setattr(cases, "after", lambda *case: "triton")
    few = dataclasses.replace(case.for_budget(), kernels=2)
    assert case.budget_of(provider, "cuda") == ("triton", few)
    case.check(provider, case.functions["exact"], inputs)
    assert asked == [("linear_gelu", "triton", few)]
    monkeypatch.setattr(cases, "after", lambda *case: "torch")
    case.check(provider, case.functions["exact"], inputs)
    assert len(asked) == 1


@pytest.mark.triton
@pytest.mark.parametrize("pass_", cases.PASSES)
def test_two_kernels_run(pass_, monkeypatch, need):
    need("bias_gelu", ("triton", "cpu"))
    monkeypatch.setitem(dispatch.AUTO_ORDER, "cpu", ("triton", "torch"))
    dispatch._chosen.clear()
    try:
        case = made(pass_, torch.bfloat16)
        inputs = case.inputs("cpu", 0)
        provider = named(case, "bertfast two kernels")
        assert case.budget_of(provider, "cpu")[0] == "triton"
        runner = provider.make(case, inputs, HERE)
        assert 0 < case.check(provider, runner, inputs) < op_case.LIMITS[torch.bfloat16]
    finally:
        monkeypatch.undo()
        dispatch._chosen.clear()


def test_a_tanh_gelu_is_held_to_its_own_numbers():
    """Held to the exact GELU's it is wrong in float32."""
    case = made("forward")
    inputs = case.inputs("cpu", 0)
    provider = named(case, cases.TANH)

    def tanh(**given):
        return F.gelu(F.linear(**given_names(given)), approximate="tanh")

    with pytest.raises(Wrong, match="relative error"):
        case.check(provider, tanh, inputs)
    tanh.reference = provider.make(case, inputs, HERE).reference
    assert case.check(provider, tanh, inputs) < 1e-6


def given_names(given):
    return {"input" if name == "x" else name: value for name, value in given.items()}


@pytest.fixture
def quack(monkeypatch):
    """quack's functions for these cases, with the names and the order of its arguments."""
    calls = []

    def gemm_act(A, B, C=None, bias=None, activation=None, *, store_preact=True, tuned=True):
        assert not any(t.requires_grad for t in (A, B, bias)) and activation == "gelu_erf"
        calls.append((store_preact, tuned))
        preact = torch.addmm(bias, A, B)
        return preact if store_preact else None, F.gelu(preact)

    def gemm_dact(A, B, PreAct, activation=None, *, tuned=True):
        assert activation == "gelu_erf"
        calls.append(tuned)
        return torch.ops.aten.gelu_backward(A @ B, PreAct), F.gelu(PreAct)

    module = ModuleType("quack.gemm_interface")
    module.gemm_act, module.gemm_dact = gemm_act, gemm_dact
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)
    return calls


@pytest.mark.parametrize(
    ("pass_", "call"),
    [("forward", (False, False)), ("training", (True, False)), ("backward", False)],
)
def test_how_quack_is_called(quack, pass_, call):
    case = made(pass_)
    inputs = case.inputs("cpu", 0)
    provider = named(case, "quack")
    assert case.check(provider, provider.make(case, inputs, HERE), inputs) < 1e-6
    assert quack == [call]


def test_a_fault_of_a_kernel_is_seen(tmp_path, monkeypatch):
    """One row of dbias that is lost: the kernel isn't timed."""

    def lost(dy, down, u, bias, v):
        dv, _ = cases._stock_backward(dy, down, u, bias, v)
        return dv, dv[1:].sum(0)

    functions = {**cases.LinearGeluBackwardCase.functions, "torch eager": lost}
    monkeypatch.setattr(cases.LinearGeluBackwardCase, "functions", functions)
    machine = ceilings.Machine("cpu", lambda row: None, quick=True)
    bench = Bench(machine, record.Recorder(None, record.environment("cpu")), repeats=1)
    case = made("backward", torch.bfloat16)
    bench.measure(case, [named(case, "torch eager")])
    assert [row.median_us for row in bench.recorder.rows] == [None]
    assert "relative error" in bench.faults[0]
