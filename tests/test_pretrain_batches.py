"""The batches of pre-training: each token in its place, and the same batches from any place on."""

import itertools
import json

import numpy as np
import pytest
import torch
from support import prepared_text
from support.prepared_text import CLS, MASK, SEP

from bertfast.recipes.pretrain import batches, shards
from bertfast.recipes.pretrain.batches import Batches, DataOptions, Place

OPTIONS = DataOptions(tokens=96, length=32)
PLAIN = DataOptions(tokens=96, length=32, nsp=False, replaced=(0.0, 0.0))


@pytest.fixture(scope="module")
def texts():
    return prepared_text.documents(60)


@pytest.fixture(scope="module")
def small():
    """Blocks and windows of few tokens, so that little text has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK", 256)
        patch.setattr(batches, "WINDOW", 1024)
        patch.setattr(batches, "FULL", 4)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts, small):
    path = tmp_path_factory.mktemp("prepared")
    prepared_text.write(path, texts[:50], texts[50:])
    return path


def epoch(made):
    """(place, batch) of one epoch."""
    return list(itertools.islice(made, made.count()))


def fields(batch):
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (place, batch), (other_place, other) in zip(ours, theirs, strict=True):
        assert place == other_place
        assert batch.max_seqlen == other.max_seqlen
        assert fields(batch).keys() == fields(other).keys()
        for name, value in fields(batch).items():
            assert torch.equal(value, fields(other)[name]), name


def originals(batch):
    ids = batch.input_ids.clone()
    ids[batch.places] = batch.labels
    return ids.numpy()


def sequences(batch):
    bounds = batch.cu_seqlens.tolist()
    return [originals(batch)[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def flat(document):
    return list(itertools.chain.from_iterable(document))


def test_an_epoch_without_pairs_has_each_token_once(folder, texts):
    made = Batches(folder, PLAIN)
    assert made.windows > 2
    (first, second) = [], []
    for number, (_, batch) in zip(range(2 * made.count()), made, strict=False):
        (first if number < made.count() else second).extend(sequences(batch))
    assert first != second  # another order
    for found in (first, second):
        assert all(one[0] == CLS and one[-1] == SEP and len(one) <= 32 for one in found)
        inner = [one[1:-1] for one in found]
        assert sorted(flat(inner)) == sorted(flat(map(flat, texts[:50])))
        # Each is a stretch of one document.
        home = {token: (n, i) for n, text in enumerate(texts) for i, token in enumerate(flat(text))}
        for one in inner:
            (document, start) = home[one[0]]
            assert [home[token] for token in one] == [
                (document, start + i) for i in range(len(one))
            ]


@pytest.mark.parametrize("options", [OPTIONS, PLAIN], ids=["pairs", "plain"])
def test_layout_of_a_batch(folder, options):
    for _, batch in epoch(Batches(folder, options)):
        assert batch.tokens <= 96 and batch.sequences >= 1
        assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[-1] == batch.tokens
        lengths = batch.cu_seqlens.diff()
        assert batch.max_seqlen == lengths.max() <= 32
        ids = originals(batch)
        for i, (a, b) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
            assert batch.position_ids[a:b].tolist() == list(range(b - a))
            one, types = ids[a:b], batch.token_type_ids[a:b].numpy()
            ends = np.flatnonzero(one == SEP)
            assert one[0] == CLS and ends[-1] == b - a - 1 and (one == CLS).sum() == 1
            assert len(ends) == (2 if options.nsp else 1)
            assert types.tolist() == [0] * (ends[0] + 1) + [1] * (b - a - ends[0] - 1)
            assert not options.nsp or (ends[0] > 1 and ends[1] > ends[0] + 1)
            places = [p for p in batch.places.tolist() if a <= p < b]
            text = b - a - len(ends) - 1
            assert len(places) == max(1, int(0.15 * text + 0.5)), i
        assert batch.places.tolist() == sorted(set(batch.places.tolist()))
        assert (batch.labels >= prepared_text.RESERVED).all()
        assert (batch.not_next is None) == (not options.nsp)


def test_micro_batches_are_as_full_as_their_order_allows(folder):
    made = Batches(folder, PLAIN)
    plan = made._plan(0, 0)
    lengths = plan.examples.first_length + 2
    for a, b in itertools.pairwise(plan.bounds):
        assert lengths[a:b].sum() <= 96
        assert b == plan.bounds[-1] or lengths[a : b + 1].sum() > 96


def test_from_any_place_the_same_batches_follow(folder):
    all_of_them = list(itertools.islice(Batches(folder, OPTIONS), 150))
    assert all_of_them[-1][0].epoch >= 1
    for number in range(0, 120, 7):
        place = Place(*json.loads(json.dumps(all_of_them[number][0])))
        again = itertools.islice(Batches(folder, OPTIONS, start=place), 12)
        assert_same(list(again), all_of_them[number + 1 : number + 13])


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_the_one_sequence(folder, world):
    everything = list(itertools.islice(Batches(folder, OPTIONS), 6 * world + 40))
    start = everything[6][0]
    taken = [
        list(itertools.islice(Batches(folder, OPTIONS, start=start, rank=r, world=world), 6))
        for r in range(world)
    ]
    dealt = [taken[r][turn] for turn in range(6) for r in range(world)]
    expected = everything[7 : 7 + 6 * world]
    for (_, ours), (_, theirs) in zip(dealt, expected, strict=True):
        for name, value in fields(ours).items():
            assert torch.equal(value, fields(theirs)[name])
    for turn in range(6):
        places = {taken[r][turn][0] for r in range(world)}
        assert {place.number for place in places} == {7 + world * (turn + 1)}
        # From each rank's place the same goes on, though windows may have ended in the round.
        for place in places:
            for rest in (1, 2):
                again = list(itertools.islice(Batches(folder, OPTIONS, start=place), rest))
                at = place.number
                assert_same(again, everything[at : at + rest])


def test_held_out_is_one_pass_always_the_same(folder, texts):
    made = Batches(folder, PLAIN, split="held-out")
    first, second = list(made), list(made)
    assert_same(first, second)
    assert len(first) == made.count()
    found = flat(one[1:-1] for _, batch in first for one in sequences(batch))
    assert sorted(found) == sorted(flat(map(flat, texts[50:])))
    dealt = [list(Batches(folder, PLAIN, split="held-out", rank=r, world=3)) for r in range(3)]
    assert sum(map(len, dealt)) == len(first)


def test_pairs_over_batches_are_of_the_documents(folder, texts):
    home = {token: (n, i) for n, text in enumerate(texts) for i, token in enumerate(flat(text))}
    labels = []
    for _, batch in epoch(Batches(folder, OPTIONS)):
        for one, not_next in zip(sequences(batch), batch.not_next.tolist(), strict=True):
            middle = one.index(SEP)
            a, b = one[1:middle], one[middle + 1 : -1]
            for segment in (a, b):
                document, start = home[segment[0]]
                assert [home[t] for t in segment] == [
                    (document, start + i) for i in range(len(segment))
                ]
            if not_next:
                assert home[a[0]][0] != home[b[0]][0]
            else:
                assert home[a[0]][0] == home[b[0]][0] and home[a[-1]][1] < home[b[0]][1]
            labels.append(not_next)
    assert set(labels) == {0, 1}


def test_masks_change_from_epoch_to_epoch_and_by_seed(folder):
    made = Batches(folder, PLAIN)
    count = made.count()
    places = {}
    for number, (_, batch) in zip(range(2 * count), made, strict=False):
        for token in batch.labels.tolist():
            places.setdefault(number < count, set()).add(token)
    assert len(places[True] & places[False]) < 0.5 * len(places[True])
    other = Batches(folder, DataOptions(**{**vars(PLAIN), "seed": 1}))
    assert not torch.equal(next(iter(made))[1].input_ids, next(iter(other))[1].input_ids)


def test_identity_tells_options_and_text_apart(folder, tmp_path, texts):
    one = Batches(folder, OPTIONS).identity
    assert one == Batches(str(folder), DataOptions(tokens=96, length=32)).identity
    prepared_text.write(tmp_path / "other", texts[:49])
    others = [
        Batches(folder, PLAIN).identity,
        Batches(folder, OPTIONS, split="held-out").identity,
        Batches(tmp_path / "other", OPTIONS).identity,
    ]
    assert len({one, *others}) == 4


BAD = [
    (dict(length=2), "length must be between 7 and"),
    (dict(length=2, nsp=False), "length must be between 3 and"),
    (dict(tokens=100, length=128), "tokens must be length or more.*got tokens 100 and length 128"),
    (dict(masked_share=0.0), "masked_share must be between 0 and 1, got 0.0"),
    (dict(masked_share=1.0), "masked_share must be between 0 and 1, got 1.0"),
    (dict(masked_share=15), "masked_share must be between 0 and 1, got 15"),
    (dict(replaced=(0.8, 0.3)), "replaced must sum to 1 or less"),
    (dict(replaced=(0.8,)), "replaced must be two shares"),
    (dict(seed=-1), "seed must be between 0 and"),
    (dict(nsp=1), "nsp must be a bool, got int"),
    (dict(short=1.5), "short must be between 0 and 1"),
]


@pytest.mark.parametrize(("wrong", "text"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_options_are_checked(wrong, text):
    with pytest.raises((ValueError, TypeError), match=text):
        DataOptions(**wrong)


def test_errors_of_batches(folder, tmp_path, texts):
    with pytest.raises(ValueError, match="split must be one of 'train', 'held-out', got 'test'"):
        Batches(folder, OPTIONS, split="test")
    with pytest.raises(ValueError, match="rank must be between 0 and 1, got 2"):
        Batches(folder, OPTIONS, rank=2, world=2)
    with pytest.raises(ValueError, match="whole_words must be False"):
        Batches(folder, DataOptions(whole_words=True))
    with pytest.raises(ValueError, match="start must be a place in this text.* got Place"):
        Batches(folder, OPTIONS, start=Place(0, 50, 0, 3))
    prepared_text.write(tmp_path / "one", texts[:1])
    with pytest.raises(ValueError, match="must have 2 or more documents in its split 'train'"):
        Batches(tmp_path / "one", OPTIONS)
    Batches(tmp_path / "one", PLAIN)
    with pytest.raises(ValueError, match="prepare the text with a larger held_out"):
        Batches(tmp_path / "one", PLAIN, split="held-out")
    with pytest.raises(FileNotFoundError, match="holds no prepared text"):
        Batches(tmp_path, OPTIONS)


@pytest.mark.parametrize("counts", [(600, 30), (30, 600)], ids=["first", "last"])
def test_one_long_document_takes_second_segments_of_the_other(tmp_path, small, counts):
    """Windows with a single document, as text of few documents has."""
    ids = iter(range(prepared_text.RESERVED, 20_000))
    long, short = ([[next(ids) for _ in range(10)] for _ in range(n)] for n in counts)
    prepared_text.write(tmp_path, [long, short])
    made = Batches(tmp_path, OPTIONS)
    assert made.windows > 4
    home = {token: n for n, text in enumerate((long, short)) for token in flat(text)}
    seen, labels = set(), []
    for _, batch in epoch(made):
        for one, not_next in zip(sequences(batch), batch.not_next.tolist(), strict=True):
            middle = one.index(SEP)
            a, b = (home[one[i]] for i in (1, middle + 1))
            assert (a != b) == not_next
            seen.update(one[1:middle])
            labels.append(not_next)
    assert {home[token] for token in seen} == {0, 1}
    # A fair coin for each, so the share is within 5 standard deviations.
    assert abs(np.mean(labels) - 0.5) < 5 * 0.5 / len(labels) ** 0.5


def test_random_tokens_and_masks_come_in_the_text_only(folder):
    for _, batch in epoch(Batches(folder, OPTIONS)):
        ids, before = batch.input_ids.numpy(), originals(batch)
        changed = np.flatnonzero(ids != before)
        assert np.isin(changed, batch.places.numpy()).all()
        assert ((ids[changed] == MASK) | (ids[changed] >= prepared_text.RESERVED)).all()
