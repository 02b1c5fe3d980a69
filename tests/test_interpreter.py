"""Triton's interpreter as the tests have it: quicker, and in nothing else another."""

import dataclasses
import importlib

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as tritons  # noqa: E402

from bertfast.ops import dispatch  # noqa: E402
from bertfast.testing import interpreter  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not isinstance(tritons._patch_lang, interpreter._Once),
        reason="Triton is not interpreting here, or not in the way that is known",
    ),
]


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _largest_twice(x_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, 16))
    for _ in range(10):
        x = _double(x)
    tl.store(out_ptr, tl.max(x, 0))


@triton.jit
def _failing(x_ptr):
    tl.static_assert(x_ptr is None, "no such thing")


@pytest.fixture
def patches(monkeypatch):
    """The functions for which the language was patched."""
    once, made = tritons._patch_lang, []

    def real(fn):
        made.append(fn.__name__)
        return once.real(fn)

    monkeypatch.setattr(tritons, "_patch_lang", interpreter._Once(real))
    return made


def test_a_launch_patches_the_language_once_and_takes_it_back(patches):
    before = dict(vars(tl))
    out = torch.zeros(1)
    for number in (1, 2):
        _largest_twice[(3,)](torch.arange(16.0), out)
        assert out.item() == 15 * 2**10
        # Once for the kernel, which sees triton.language, and once for tl.max, which sees its core.
        assert len(patches) == 2 * number and patches[-2] == "_largest_twice"
    assert dict(vars(tl)) == before


def test_a_launch_that_fails_is_forgotten(patches):
    with pytest.raises(tritons.InterpreterError, match="no such thing"):
        _failing[(1,)](torch.zeros(16))
    _largest_twice[(1,)](torch.arange(16.0), out := torch.zeros(1))
    assert out.item() == 15 * 2**10
    assert patches == ["_failing", "_largest_twice", patches[-1]]


@pytest.mark.parametrize("op", [op for op in dispatch.ops() if op != "attention_qkv"])
def test_the_numbers_are_the_interpreters_own(op, monkeypatch):
    table = importlib.import_module(f"bertfast.testing.{op}")
    case, *_ = sorted(table.quick_cases(), key=lambda case: getattr(case, "p", 0.0))[::-1]
    inputs = table.make_inputs(case, torch.bfloat16)
    quick = table.run(inputs, "triton")
    builder, core = tritons.interpreter_builder, tl.core
    monkeypatch.setattr(tritons, "_patch_lang", tritons._patch_lang.real)
    for name in ("_patch_builtin", "_get_np_dtype"):
        monkeypatch.setattr(tritons, name, getattr(tritons, name).__wrapped__)
    for kind in (core.block_type, core.tensor):
        monkeypatch.setattr(kind, "__init__", kind.__init__.__wrapped__)
    semantic = tritons.interpreter_semantic
    real = semantic.broadcast_impl_value.__wrapped__
    monkeypatch.setattr(semantic, "broadcast_impl_value", real)
    options = dataclasses.replace(builder.options, sanitize_overflow=True)
    monkeypatch.setattr(builder, "options", options)
    for name, value in table.run(inputs, "triton").items():
        assert torch.equal(value, quick[name]), name


def test_an_interpreter_that_is_not_known_is_left_alone(monkeypatch):
    other = tritons._patch_lang.real
    monkeypatch.setattr(tritons, "_patch_lang", other)
    monkeypatch.delattr(tritons, "_LangPatchScope")
    interpreter.quicken()
    assert tritons._patch_lang is other
