"""Nobody's texts touch: what is in one sequence never reaches another, NaN and infinities included.

A batch is computed as it is and with some of its sequences spoilt. The others' output and gradients
must be the same bits, whoever shares a tile with whom.
"""

import itertools
import random

import pytest
import torch

from bertfast import packing
from bertfast.ops import attention, attention_qkv, dropout
from bertfast.ops.attention import reference
from bertfast.ops.attention.scores import Scores

NAMES = ("q", "k", "v", "dout")
SPOILT = (torch.nan, torch.inf, -torch.inf)
LAYOUTS = ("padded", "masked", "packed", "planned")


def run(inputs, lengths, layout, backend, p, one_buffer=False):
    """Output and gradients, sequence by sequence: each (length, heads, head_dim)."""
    q, k, v, dout = (inputs[name] for name in NAMES)
    length = max(lengths)
    inside = torch.arange(length) < torch.tensor(lengths)[:, None]
    options = dict(dropout_p=p, seed=torch.tensor([7]), backend=backend)
    if layout in ("packed", "planned"):
        q, k, v, dout = (x[inside] for x in (q, k, v, dout))
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        options |= dict(cu_seqlens=cu_seqlens, max_seqlen=length)
        if layout == "planned":
            options["plan"] = packing.plan(cu_seqlens, length, sum(lengths))
    elif layout == "masked":
        options["key_mask"] = inside
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    if one_buffer:
        out = attention_qkv(torch.stack(leaves, -3), **options)
    else:
        out = attention(*leaves, **options)
    results = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    if layout in ("packed", "planned"):
        return [[*x.split(lengths)] for x in results]
    return [[x[b, :n] for b, n in enumerate(lengths)] for x in results]


def make(lengths, head_dim, dtype, heads=2, generator=None):
    shape = (len(lengths), max(lengths), heads, head_dim)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name in NAMES}
    # Of a padded batch's queries beyond their row's end no gradient is asked.
    outside = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    made["dout"][outside] = 0
    return made


def spoil(inputs, name, rows, lengths, rng):
    """A few values of those rows' tensor."""
    spoilt = dict(inputs) | {name: inputs[name].clone()}
    for row in rows:
        for _ in range(rng.randint(1, 4)):
            at = (row, rng.randrange(lengths[row]), rng.randrange(2))
            column = rng.randrange(inputs[name].shape[-1])
            spoilt[name][at][column] = rng.choice(SPOILT)
    return spoilt


def hold_apart(inputs, spoilt, rows, lengths, layout, backend, p, one_buffer=False):
    clean = run(inputs, lengths, layout, backend, p, one_buffer)
    found = run(spoilt, lengths, layout, backend, p, one_buffer)
    touched = False
    for name, before, after in zip(("out", "dq", "dk", "dv"), clean, found, strict=True):
        for number, (a, b) in enumerate(zip(before, after, strict=True)):
            if number in rows:
                touched = touched or not torch.equal(a, b)
            else:
                assert torch.equal(a, b), (name, number, lengths)
    assert touched


def lengths_of(rng, layout):
    if layout == "planned":  # several in a tile, and some that have tiles of their own
        return [rng.choice((1, 3, 5, 9, 17, 20, 31, 32, 40, 65)) for _ in range(rng.randint(3, 6))]
    return [rng.randint(1, 70) for _ in range(rng.randint(2, 3))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_on_torch(layout, name, p):
    rng = random.Random(f"{layout} {name} {p}")
    for _ in range(6):
        lengths = lengths_of(rng, layout)
        inputs = make(lengths, rng.choice((8, 16, 32)), torch.float32)
        rows = rng.sample(range(len(lengths)), rng.randint(1, len(lengths) - 1))
        hold_apart(
            inputs, spoil(inputs, name, rows, lengths, rng), rows, lengths, layout, "torch", p
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_on_torch_where_lengths_cannot_be_looked_at(name, p):
    """As on a GPU and while compiling: each sequence is a row of a padded batch."""
    rng = random.Random(f"{name} {p}")
    lengths = [5, 17, 1, 9]
    inputs = make(lengths, 16, torch.float32)
    inside = torch.arange(17) < torch.tensor(lengths)[:, None]
    bounds = torch.tensor([0, 5, 22, 23, 32], dtype=torch.int32)

    def results(given):
        leaves = [given[n][inside].clone().requires_grad_() for n in NAMES[:3]]
        drop = dropout.dropout_of(p, torch.tensor([7]), 0, bounds.device)
        out = reference._through_padding(*leaves, bounds, 17, Scores(0.25), drop)
        return [out.detach(), *torch.autograd.grad(out, leaves, given["dout"][inside])]

    for row in range(4):
        spoilt = spoil(inputs, name, [row], lengths, rng)
        others = torch.ones(4, dtype=torch.bool)
        others[row] = False
        others = others.repeat_interleave(torch.tensor(lengths))
        for a, b in zip(results(inputs), results(spoilt), strict=True):
            assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_kernels(layout, name, target, need, finest):
    backend, device = target
    need("attention", target)
    if device != "cpu":
        pytest.skip("bits of a GPU are compared by the same test of what it computes there")
    rng = random.Random(f"{layout} {name} {backend}")
    for number in range(3 if backend == "triton" else 12):
        lengths = lengths_of(rng, layout)
        dtype = rng.choice((torch.float16, torch.bfloat16, finest("attention", target)))
        head_dim = rng.choice((8, 16, 32, 64, 96, 128) if backend == "cuda" else (16, 32))
        inputs = make(lengths, head_dim, dtype)
        rows = rng.sample(range(len(lengths)), rng.randint(1, len(lengths) - 1))
        spoilt = spoil(inputs, name, rows, lengths, rng)
        p = (0.0, 0.2)[number % 2]
        hold_apart(inputs, spoilt, rows, lengths, layout, backend, p, number % 3 == 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_spoilt_text_is_spoilt_as_in_stock(name, target, need):
    """Not finite where float64's result isn't, right where it is, in a tile that others share."""
    backend, device = target
    need("attention", target, torch.float16)
    if device != "cpu":
        pytest.skip("the same as on the CPU")
    lengths = [9, 20, 14]
    inputs = make(lengths, 16, torch.float16)
    spoilt = dict(inputs) | {name: inputs[name].clone()}
    spoilt[name][1, 4, 0, 3] = torch.nan
    found = run(spoilt, lengths, "planned", backend, 0.0)
    exact = run({n: x.double() for n, x in spoilt.items()}, lengths, "planned", "torch", 0.0)
    for result, reference_result in zip(found, exact, strict=True):
        a, b = result[1].double(), reference_result[1]
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a.nan_to_num(), b.nan_to_num(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("length", [5, 40, 70, 140])
def test_a_query_without_any_key(length, target, need):
    """Zeros and zero gradients, whatever it is and whatever comes back to it; on torch too."""
    backend, device = target
    need("attention", target, torch.float16)
    for name in (backend, "torch"):
        inputs = make([length, length], 16, torch.float16)
        key_mask = torch.ones(2, length, dtype=torch.bool)
        key_mask[0] = False
        for tensor in inputs.values():
            tensor[0, length // 2] = torch.nan
            tensor[0, 0, 0, 2] = torch.inf
        leaves = [inputs[n].to(device).requires_grad_() for n in NAMES[:3]]
        out = attention(*leaves, key_mask=key_mask.to(device), backend=name)
        grads = torch.autograd.grad(out, leaves, inputs["dout"].to(device))
        for tensor in (out, *grads):
            assert (tensor[0] == 0).all(), name
            assert tensor[1].isfinite().all() and tensor[1].abs().max() > 0


@pytest.fixture
def spoilt_batch():
    """Sequences that share a tile, one of them spoilt in all four tensors."""
    lengths = [9, 20, 14, 3]
    inputs = make(lengths, 64, torch.float16)
    rng = random.Random(5)
    for name in NAMES:
        inputs = spoil(inputs, name, [1], lengths, rng)
    return inputs, lengths


@pytest.mark.host
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_tile_done_again_is_the_same_in_every_scheduling_order(host_runtime, spoilt_batch, p):
    """And without races, of which the host build would raise; perturbed, the others keep apart."""
    inputs, lengths = spoilt_batch
    results = []
    for order, seed in (("depth-first", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        host_runtime.set_schedule(order, seed)
        results.append(run(inputs, lengths, "planned", "cuda", p))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            for a, b in zip(one, two, strict=True):
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    host_runtime.set_schedule("depth-first", 0)
    host_runtime.set_perturb(True, 1)
    for found in run(inputs, lengths, "planned", "cuda", p):
        assert all(x.isfinite().all() for n, x in enumerate(found) if n != 1)


@pytest.mark.host
def test_a_tile_done_again_has_no_bank_conflicts(host_runtime, spoilt_batch):
    inputs, lengths = spoilt_batch
    host_runtime.reset_records()
    run(inputs, lengths, "planned", "cuda", 0.0)
    assert [record for record in host_runtime.bank_conflicts() if record[1] > 1] == []
