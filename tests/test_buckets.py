"""Buckets of packed tokens: what fills them, what they cost, and attention in one."""

import numpy as np
import pytest
import torch

from bertfast.ops import attention_qkv
from bertfast.packing import buckets, compiled, lay_out
from bertfast.packing.buckets import MOST_TOKENS, Bucket, fill, rungs, whole

CPU = torch.device("cpu")
MOST = 8192  # of a model of width 768
# Search queries, questions with their passages, passages: mean and spread of the logarithm of
# their lengths, the shortest, the longest.
TEXTS = ((16.5, 0.62, 4, 128), (165, 0.38, 30, 384), (112, 0.40, 12, 256))


def traffic(requests, seed=0):
    """Lengths of requests to a server: one text, or up to 64 of a kind."""
    rng = np.random.default_rng(seed)
    for _ in range(requests):
        middle, spread, least, most = TEXTS[rng.integers(len(TEXTS))]
        drawn = rng.lognormal(np.log(middle), spread, rng.choice([1, 4, 16, 32, 64]))
        yield np.clip(drawn, least, most).astype(np.int64)


def test_rungs():
    found = list(rungs(1, MOST))
    assert len(found) == 36 and found[0] == 64 and found[-1] == MOST
    assert found == sorted(set(found)) and list(rungs(65, 200)) == [128, 192]
    assert list(rungs(MOST, MOST)) == [MOST] and list(rungs(MOST + 1, MOST)) == []
    assert list(rungs(1))[-1] == MOST_TOKENS


def test_waste_of_mixed_traffic():
    """At most a twentieth of all tokens that graphs compute is no request's, by few graphs."""
    real = computed = beyond = 0
    keys = set()
    for lengths in traffic(10_000):
        found = fill(lengths, CPU, MOST)
        if found is None:
            beyond += 1
            assert lengths.sum() > MOST
            continue
        keys.add(found.bucket)
        real += found.total
        computed += found.bucket.tokens
    assert beyond < 1000
    assert 1 - real / computed <= 0.05
    assert len(keys) <= 64


@pytest.mark.skipif(compiled.module() is None, reason="no module was built")
def test_a_compiled_module_fills_as_python_does(monkeypatch):
    many = [np.array(lengths) for lengths in ([1, 33] * 16, [1] * 60, [64], [8000] * 3, [5, 0, 9])]
    many += list(traffic(200))
    found = [fill(lengths, CPU, MOST) for lengths in many]
    monkeypatch.setattr(buckets, "module", lambda: None)
    for lengths, one in zip(many, found, strict=True):
        expected = fill(lengths, CPU, MOST)
        assert (one is None) == (expected is None)
        if one is not None:
            assert torch.equal(one.numbers, expected.numbers)
            assert one._replace(numbers=None) == expected._replace(numbers=None)


def test_a_compiled_module_is_told_buckets_that_hold_their_numbers():
    module = compiled.module()
    if module is None:
        pytest.skip("no module was built")
    lengths, right = np.array([9, 5]), np.array([[64, 18, 6, 20, 42]])
    assert module.fill(lengths, 32, right)[0] == 0
    for column in (3, 4):  # the tiles' place, and how many numbers there are
        wrong = right.copy()
        wrong[0, column] -= 12
        with pytest.raises(ValueError, match="has no room for its numbers"):
            module.fill(lengths, 32, wrong)
    with pytest.raises(ValueError, match="a length is below 0"):
        module.fill(-lengths, 32, right)
    with pytest.raises(ValueError, match="and buckets were expected"):
        module.fill(lengths, 32, right[:, :4])
    with pytest.raises(TypeError):
        module.fill(lengths.astype(np.int32), 32, right)


@pytest.mark.parametrize("seed", range(20))
def test_what_fills_a_bucket_has_tiles_of_its_own(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.choice([3, 40, 200]) + 1, rng.integers(1, 40))
    found = fill(lengths, CPU, MOST)
    bucket, total = found.bucket, int(lengths.sum())
    assert bucket.tokens in rungs(total, MOST) and found.numbers.shape == (bucket.size,)
    # The batch itself is as lay_out makes it.
    expected_cu, expected = lay_out(lengths.tolist())
    cu_seqlens, plan = found.plan()
    assert torch.equal(cu_seqlens, expected_cu) and torch.equal(plan.tiles, expected.tiles)
    names = ("tile", "sequences", "max_seqlen", "total")
    assert all(getattr(plan, name) == getattr(expected, name) for name in names)
    # In the whole bucket each token is in one tile, and of fillers each tile has one.
    bounds, plan = whole(bucket, found.numbers)
    assert bounds[-1] == bucket.tokens and (bounds.diff() >= 0).all()
    covered = torch.zeros(bucket.tokens, dtype=torch.int)
    for sequence, first, many in plan.tiles[: int(plan.count)].tolist():
        start = int(bounds[sequence]) + first
        end = min(start + bucket.tile, int(bounds[sequence + many]))
        covered[start:end] += 1
        assert end <= total or start >= total
    assert (covered == 1).all()
    assert (plan.tiles[int(plan.count) :] == 0).all()


@pytest.mark.parametrize("tile", [32, 64])
def test_batches_of_one_length_always_fit(tile):
    for length in range(4, 400):  # a sequence's room; texts with [CLS] and [SEP] have three or more
        for rows in (1, 2, 7, 20):
            if rows * length <= MOST:
                found = fill(np.full(rows, length), CPU, MOST)
                assert found is not None and found.bucket.tokens == next(rungs(rows * length))


def test_a_batch_that_needs_more_room_takes_the_next_bucket_or_none():
    lengths = np.array([1, 33] * 16)  # each pair begins a tile of 32 twice
    usual = next(rungs(int(lengths.sum())))
    assert fill(lengths, CPU).bucket.tokens >= usual
    many = np.ones(60, dtype=np.int64)  # room for one sequence of four tokens
    assert fill(many, CPU).bucket == Bucket(320, 32)
    assert fill(many, CPU, most=128) is None
    assert fill(np.zeros(3, dtype=np.int64), CPU) is None


@pytest.mark.parametrize("lengths", [(20, 9, 3), (40, 70), (64,), (1,) * 9, (33, 2)])
def test_attention_in_a_bucket_has_the_batch_s_own_numbers(target, need, lengths):
    """Also with NaN in the tokens that fill it."""
    need("attention_qkv", target, torch.float16, 32)
    backend, device = target
    found = fill(np.array(lengths), torch.device(device))
    torch.manual_seed(0)
    qkv = torch.full((found.bucket.tokens, 3, 2, 32), torch.nan, device=device)
    qkv[: found.total] = torch.randn(found.total, 3, 2, 32)
    qkv = qkv.half()
    cu_seqlens, plan = whole(found.bucket, found.numbers)
    options = dict(plan=plan, max_seqlen=plan.max_seqlen, backend=backend)
    y = attention_qkv(qkv, cu_seqlens=cu_seqlens, **options)[: found.total]
    cu_seqlens, plan = found.plan()
    options = dict(plan=plan, max_seqlen=plan.max_seqlen, backend=backend)
    expected = attention_qkv(qkv[: found.total], cu_seqlens=cu_seqlens, **options)
    assert torch.equal(y, expected)
