"""attention by position as cases of `bertfast bench`: what is counted, what others are given."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from bertfast.commands.bench import floor
from bertfast.commands.bench.case import Setting, Wrong
from bertfast.commands.bench.cases import attention_positions as cases
from bertfast.commands.bench.cases.attention_positions import PositionsCase
from bertfast.commands.bench.models import Tokens, full_batch
from bertfast.ops.triton_launch import Launch
from bertfast.testing import positions

HERE = Setting("cpu")
FULL, MIXED = full_batch(2, 20), Tokens("mixed", (20, 3, 11))
FORMS = [
    dict(rotary=True),
    dict(rotary=True, window=(3, 5)),
    dict(reach=4),
    dict(rotary=True, window=(30, 2), reach=40),
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
batches = pytest.mark.parametrize("tokens", [FULL, MIXED], ids=["full", "mixed"])


def made(pass_, tokens=FULL, dtype=torch.float32, p=0.0, **form):
    return PositionsCase(pass_, tokens, 2, 16, dtype, p, **form)


def named(case, name):
    (found,) = (one for one in case.providers() if one.name == name)
    return found


@pytest.mark.parametrize("window", [(0, 0), (3, 5), (64, 64), (1, 100), (100, 0)])
def test_pairs_of_a_window(window):
    lengths = (0, 1, 2, 7, 66, 150)
    pairs = sum(int(positions.in_window(length, window).sum()) for length in lengths)
    assert floor.pairs_of(lengths, window) == pairs
    assert floor.pairs_of(lengths, (150, 150)) == floor.pairs_of(lengths)


def test_work():
    """The visited pairs' products; q, k, v and out as without; the tables."""
    plain = made("forward", dtype=torch.float16)
    (whole,) = plain.work()
    (local,) = dataclasses.replace(plain, rotary=True, window=(3, 5)).work()
    assert whole.flops == 4 * 2 * 16 * 2 * 20 * 20
    assert local.flops == 4 * 2 * 16 * 2 * (20 + 3 * 17 + 3 + 5 * 15 + 10)
    assert whole.bytes == 4 * 40 * 32 * 2 and local.bytes == whole.bytes + 2 * 20 * 8 * 4
    back = made("backward", dtype=torch.float16)
    (biased,) = dataclasses.replace(back, reach=4).work()
    assert biased.bytes == back.work()[0].bytes + 2 * 2 * 9 * 2  # read, and its gradient written


@pytest.mark.triton
@pytest.mark.parametrize("form", FORMS[:2] + [{}], ids=str)
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_counts_are_those_of_the_launches(pass_, form, monkeypatch, need):
    """Kernels, and the units of q that their launches name, of sequences of two tiles."""
    need("attention_qkv", ("triton", "cpu"))
    tokens = full_batch(2, 200)
    case = made(pass_, tokens, torch.bfloat16, **form)
    unit = tokens.real * 32
    inputs = case.inputs("cpu", 0)
    launches = []

    def launch(self, grid, pointers, *rest, **options):
        tensors = [getattr(p, "base", p) for p in pointers if p is not None]
        launches.append(sum(t.numel() == unit for t in tensors))

    step = case.step(case.functions["bertfast"]("triton"), inputs)
    monkeypatch.setattr(Launch, "__call__", launch)
    step()
    counts = case.counts(named(case, "bertfast triton"))
    assert counts.kernels == len(launches)
    ((work, _),) = counts.attention
    least = 8 if pass_ == "backward" else 4
    # The second kernel of a backward is told of dq, and doesn't touch it.
    assert counts.bytes == (sum(launches) - least - (pass_ == "backward")) * unit * 2
    assert work == case.work()[0]
    assert case.counts(named(case, "torch sdpa")) is None


@batches
@forms
def test_ours_and_stocks_are_one_function(form, tokens):
    """In float64: outputs at tokens, and the gradients; the matrix's, gathered, is the table's."""
    case = made("backward", tokens, **form)
    inputs = case.inputs("cpu", 0)
    ours, stock = case.functions["bertfast"]("torch"), case.functions["torch sdpa"]
    given = inputs.of(ours).double()
    real = tokens.mask("cpu")
    wide = inputs.double()
    wide = dataclasses.replace(wide, dy=wide.dy * real[..., None, None])
    mine, theirs = case.step(ours, given)(), case.step(stock, wide)()
    forward = dataclasses.replace(case, pass_="forward")
    pairs = [(forward.step(ours, given)()[0], forward.step(stock, wide)()[0]), (mine[0], theirs[0])]
    for one, other in pairs:
        torch.testing.assert_close(one, other[real] if one.ndim < other.ndim else other)
    if case.biased:
        table = given.leaves["distance_bias"]
        torch.testing.assert_close(mine[1], positions.by_distance(theirs[1][None], table))


@batches
@forms
@pytest.mark.parametrize("pass_", ["forward", "training", "backward"])
def test_what_runs_on_a_cpu(pass_, form, tokens):
    case = made(pass_, tokens, torch.bfloat16, **form)
    inputs = case.inputs("cpu", 1)
    able = [one for one in case.providers() if one.why_not(case, HERE) is None]
    able = [one for one in able if one.name != "bertfast triton"]  # a dry run has it
    assert {"bertfast torch", "torch sdpa", "torch sdpa math"} <= {one.name for one in able}
    for one in able:
        assert case.check(one, one.make(case, inputs, HERE), inputs) < 2**-6


def test_a_window_that_is_left_out_is_found():
    case = made("forward", FULL, torch.bfloat16, window=(3, 5))
    inputs = case.inputs("cpu", 1)
    wrong = case.functions["torch sdpa"]

    def everything(how, **given):
        return wrong(how=how._replace(mask=None), **given)

    with pytest.raises(Wrong, match="relative error"):
        case.check(named(case, "torch sdpa"), everything, inputs)


@forms
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_flex_attention_is_the_same(form, backend):
    """As it is compiled for a GPU; without one it has no backward."""
    case = made("forward", **form)
    inputs = case.inputs("cpu", 2)
    provider = named(case, "torch flex")
    assert provider.why_not(case, HERE) == "it needs a GPU"
    torch._dynamo.reset()
    runner = provider.make(case, inputs, Setting("cpu", backend))
    assert case.check(provider, runner, inputs) < 1e-5


def _flash(seen):
    """The flash-attn package as it is called: its functions' names and arguments, by torch."""

    def attend(q, k, v, p, window, lengths):
        assert p == 0.0
        outs = []
        for parts in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
            inside = positions.in_window(len(parts[0]), window if window[0] >= 0 else None)
            heads = (t.transpose(0, 1) for t in parts)
            outs.append(F.scaled_dot_product_attention(*heads, inside).transpose(0, 1))
        return torch.cat(outs)

    def flash_attn_func(q, k, v, dropout_p=0.0, *, window_size):
        seen.append("flash_attn_func")
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return attend(*flat, dropout_p, window_size, [q.shape[1]] * len(q)).view(q.shape)

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, most_q, most_k, dropout_p=0.0, *, window_size):
        seen.append("flash_attn_varlen_func")
        assert cu_q is cu_k and most_q == most_k == cu_q.diff().max()
        return attend(q, k, v, dropout_p, window_size, cu_q.diff().tolist())

    def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, *, window_size):
        return flash_attn_func(*qkv.unbind(2), dropout_p, window_size=window_size)

    def flash_attn_varlen_qkvpacked_func(qkv, cu, most, dropout_p=0.0, *, window_size):
        bounds = (cu, cu, most, most)
        return flash_attn_varlen_func(*qkv.unbind(1), *bounds, dropout_p, window_size=window_size)

    def apply_rotary(
        x, cos, sin, *, cu_seqlens=None, max_seqlen=None, inplace=False, conjugate=False
    ):
        assert x.dtype == cos.dtype and cos.shape == sin.shape == (len(cos), x.shape[-1] // 2)
        seen.append("in place" if inplace else "apart")
        place = torch.arange(x.shape[-3])
        if cu_seqlens is not None:
            assert max_seqlen == cu_seqlens.diff().max()
            place = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
        cos, sin = (t[place][:, None] for t in (cos, -sin if conjugate else sin))
        first, second = x.chunk(2, -1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return x.copy_(rotated) if inplace else rotated

    flash = ModuleType("flash_attn")
    flash.__spec__ = object()
    for function in (flash_attn_func, flash_attn_varlen_func):
        setattr(flash, function.__name__, function)
    for function in (flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func):
        setattr(flash, function.__name__, function)
    layers, kernels = ModuleType("rotary"), ModuleType("rotary")
    layers.apply_rotary_emb, kernels.apply_rotary = apply_rotary, apply_rotary
    return {
        **{"flash_attn": flash, "flash_attn.layers": ModuleType("layers")},
        **{"flash_attn.ops": ModuleType("ops"), "flash_attn.ops.triton": ModuleType("triton")},
        **{"flash_attn.layers.rotary": layers, "flash_attn.ops.triton.rotary": kernels},
    }


@batches
@pytest.mark.parametrize("form", FORMS[:2] + [dict(window=(3, 5))], ids=str)
@pytest.mark.parametrize("pass_", ["forward", "training", "backward"])
def test_flash_attention_is_given_the_same(pass_, form, tokens, monkeypatch):
    seen = []
    for name, module in _flash(seen).items():
        monkeypatch.setitem(sys.modules, name, module)
    case = made(pass_, tokens, torch.bfloat16, **form)
    inputs = case.inputs("cpu", 3)
    before = {name: leaf.clone() for name, leaf in inputs.leaves.items()}
    provider = named(case, "flash-attn")
    for _ in range(2):
        assert case.check(provider, provider.make(case, inputs, HERE), inputs) < 2**-6
    for name, leaf in inputs.leaves.items():
        assert torch.equal(leaf, before[name])
    assert ("in place" in seen) == (pass_ == "backward" and "rotary" in form)
    assert ("apart" in seen) == (pass_ != "backward" and "rotary" in form)


def test_who_takes_what(monkeypatch):
    gpu = Setting("cuda")
    rotary, local, biased = (made("forward", **form) for form in FORMS[:3])
    flash, flex = "torch sdpa flash", "torch flex"
    assert named(rotary, flash).why_not(rotary, gpu) is None
    for case in (local, biased):
        assert named(case, flash).why_not(case, gpu) == "it takes no mask"
        assert named(case, flex).why_not(case, gpu) is None
    packed = made("forward", MIXED, **FORMS[1])
    assert named(packed, flex).why_not(packed, gpu) == "it is timed without padding"
    monkeypatch.setitem(sys.modules, "flash_attn", _flash([])["flash_attn"])
    half = dataclasses.replace(biased, dtype=torch.float16)
    assert named(half, "flash-attn").why_not(half, gpu) == "it takes no bias by distance"


def test_the_names_of_cases():
    assert made("forward", **FORMS[3]).shape == "2x20x2x16 rotary window 30+2 bias 40"
    for listed in (cases.gpu_cases(), cases.cpu_cases(), cases.dry_cases()):
        names = [(case.shape, case.pass_, case.dropout) for case in listed]
        assert len(set(names)) == len(names)
        assert {case.op for case in listed} == {"attention_qkv"}
