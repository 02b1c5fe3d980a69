"""attention at lengths beyond every line of a table: it serves them, or refuses with its reason."""

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch

import bertfast
from bertfast import packing
from bertfast.ops import attention, attention_qkv, dispatch
from bertfast.ops.attention import config, limits

LENGTHS = (1, 64, 128, 8192, 8193, 2**17 + 1, 2**31 - 1)


@pytest.mark.parametrize("pass_", config.PASSES)
def test_a_split_for_every_length(pass_):
    cases = itertools.product(
        *(config.ARCHITECTURES, (2, 4, 8), (1, 16, 64, 65, limits.MAX_HEAD_DIM), LENGTHS),
        *((False, True), (0, packing.SMALL_TILE, packing.TILE), (False, True)),
    )
    for case in cases:
        chosen = config.config(pass_, *case)
        assert chosen is None if chosen is None else chosen.block_m >= 16
        assert chosen is not None or pass_ == "whole"


@pytest.mark.parametrize("pass_", config.PASSES)
def test_a_head_that_no_split_serves_is_refused_with_the_reason(pass_):
    text = "the head dimension must be between 1 and 128, got 200"
    with pytest.raises(ValueError, match=text):
        config.config(pass_, 90, 2, 200, 512, False, 0, False)


@pytest.mark.triton
def test_a_registered_op_refuses_with_the_reason(need):
    need("attention", ("triton", "cpu"))
    q = torch.randn(1, 9, 1, 200)
    rest = (None, None, None, 0, None, 0, 1.0, 0, 0, "triton")
    with pytest.raises(ValueError, match="the head dimension must be between 1 and 128, got 200"):
        torch.ops.bertfast.attention(q, q, q, *rest)


def test_nothing_ends_in_stop_iteration():
    """next() with a default, or none at all."""
    found = []
    for path in sorted(Path(bertfast.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "next":
                if len(node.args) < 2:
                    found.append(f"{path.name}:{node.lineno}")
    assert not found


# Packed batches under torch.compile, which know no other length than their number of tokens.


def packed(lengths, device, dtype, width=8):
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    qkv = torch.randn(sum(lengths), 3, 1, width).to(device, dtype)
    return qkv, cu


@pytest.mark.host
def test_a_compiled_packed_batch_has_any_number_of_tokens(need):
    """In Triton the interpreter would take 15 s; its splits are seen above."""
    need("attention", ("cuda", "cpu"))
    qkv, cu = packed([206] * 40, "cpu", torch.float16)
    assert qkv.shape[0] > 8192

    def f(qkv, cu):
        tokens = qkv.shape[0]
        return attention_qkv(qkv, cu_seqlens=cu, max_seqlen=tokens, backend="cuda")

    torch._dynamo.reset()
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(qkv, cu)
    want = attention_qkv(qkv.double(), cu_seqlens=cu, max_seqlen=206)
    # Sums of 206 values below 5 by weights below 1: their roundings and the output's.
    assert (out.double() - want).abs().max() < 2 * 5 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_the_compiled_reference_makes_no_row_longer_than_all_tokens(backward, dynamic):
    """A row of 2**31 - 1 tokens would take 16 GB for its positions alone."""
    qkv, cu = packed([9, 0, 30], "cpu", torch.float32)
    qkv.requires_grad_(backward)

    def f(qkv, cu):
        return attention_qkv(qkv, cu_seqlens=cu, max_seqlen=2**31 - 1, backend="torch")

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    out = compiled(qkv, cu)
    torch.testing.assert_close(out, f(qkv, cu))
    if backward:
        ours, want = (torch.autograd.grad(y.square().sum(), qkv) for y in (out, f(qkv, cu)))
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("strict", [False, True])
def test_the_reference_is_exported_for_any_number_of_tokens(strict):
    class Block(torch.nn.Module):
        def forward(self, qkv, cu):
            return attention_qkv(qkv, cu_seqlens=cu, max_seqlen=40, backend="torch")

    tokens, bounds = torch.export.Dim("tokens", min=2), torch.export.Dim("bounds", min=3)
    shapes = ({0: tokens}, {0: bounds})
    example = packed([40, 30], "cpu", torch.float32)
    program = torch.export.export(Block(), example, dynamic_shapes=shapes, strict=strict)
    for lengths in ([5, 1], [40] * 5, [3]):
        qkv, cu = packed([*lengths, 0, 0], "cpu", torch.float32)
        torch.testing.assert_close(program.module()(qkv, cu), Block()(qkv, cu))


# Packed batches that have more programs than CUDA starts, unless a plan cuts them into tiles.


def a_plan(kind, cu, longest):
    if kind == "none":
        return None
    if kind == "fitting":
        return packing.plan(cu, longest, int(cu[-1]))
    # As on a device whose lengths the host doesn't know: room for sequences of the longest each.
    known, room = packing.plan(cu, longest), packing.plan(cu.to("meta"), longest).tiles.shape
    tiles = torch.zeros(room, dtype=torch.int32, device=cu.device)
    tiles[: len(known.tiles)] = known.tiles
    return packing.Plan(tiles, known.count, known.tile, known.sequences, longest)


@pytest.mark.parametrize("kind", ["none", "roomy", "fitting"])
def test_a_packed_batch_beyond_the_limit_is_planned(kind, target, need, finest, monkeypatch):
    need("attention", target)
    backend, device = target
    qkv, cu = packed([70, 3, 0, 5, 64, 2], device, finest("attention", target))
    options = dict(cu_seqlens=cu, max_seqlen=144, backend=backend)
    leaf = qkv.clone().requires_grad_()
    want = attention_qkv(leaf, **options)
    (want_grad,) = torch.autograd.grad(want.sum(), leaf)

    rooms = []
    module = dispatch.backend_module("attention", backend)
    for name in ("forward", "backward"):
        run = getattr(module, name)

        def recorded(*arguments, run=run):
            (tiles,) = (a.tiles for a in arguments if isinstance(a, packing.Sequences))
            rooms.append(len(tiles))
            return run(*arguments)

        monkeypatch.setattr(module, name, recorded)
    monkeypatch.setattr(limits, "MAX_POSITIONS", 1000)
    monkeypatch.setattr(dispatch, "_chosen", {})
    leaf = qkv.clone().requires_grad_()
    out = attention_qkv(leaf, plan=a_plan(kind, cu, 144), **options)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert rooms == [11, 11]  # 144 tokens in tiles of 32, and one for each of 6 sequences
    for ours, other in ((out, want), (grad, want_grad)):
        torch.testing.assert_close(ours, other)


def test_a_packed_batch_with_too_many_tiles_is_refused(target, need):
    need("attention", target)
    backend, device = target
    cu = torch.zeros((), dtype=torch.int32, device=device).expand(2**25 + 1)
    q = torch.zeros(0, 2**10, 8, dtype=torch.float16, device=device)
    text = "sequences * heads * (longest sequence + 128) must be at most 34359738368, got 1 * 1024"
    with pytest.raises(ValueError, match=re.escape(text)):
        attention(q, q, q, cu_seqlens=cu, max_seqlen=8, backend=backend)
