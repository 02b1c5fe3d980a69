"""Tokens that are to be predicted: how many, which, and what stands there instead."""

import itertools

import numpy as np
import pytest

from bertfast.recipes.pretrain.draws import MASKS, Draws
from bertfast.recipes.pretrain.masking import Masking

CLS, SEP, MASK, FIRST, VOCABULARY = 2, 3, 4, 5, 1005
ORDINARY = np.arange(FIRST, VOCABULARY)


def masking(share=0.15, replaced=(0.8, 0.1), continues=None):
    return Masking(share, replaced, MASK, ORDINARY, continues)


def batch(counts, seed=0):
    """Sequences [CLS] text [SEP]: ids, the places of the text, and its lengths."""
    counts = np.asarray(counts)
    text = np.concatenate(
        [np.arange(n) + start for n, start in zip(counts, _starts(counts), strict=True)]
    )
    ids = np.full(int((counts + 2).sum()), SEP)
    ids[np.cumsum(counts + 2) - counts - 2] = CLS
    ids[text] = np.random.default_rng(seed).integers(FIRST, VOCABULARY, len(text))
    return ids, text, counts


def _starts(counts):
    return np.cumsum(counts + 2) - counts - 1


def drawn(number=0):
    return Draws(7, MASKS, 0, number)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.9])
def test_how_many_and_which(share):
    ids, text, counts = batch([*range(1, 60), 510])
    before = ids.copy()
    places, labels = masking(share)(ids, text, counts, drawn())
    assert (np.diff(places) > 0).all() and np.isin(places, text).all()
    assert (labels == before[places]).all()
    rest = np.setdiff1d(np.arange(len(ids)), places)
    assert (ids[rest] == before[rest]).all()
    for n, start in zip(counts, _starts(counts), strict=True):
        found = ((places >= start) & (places < start + n)).sum()
        assert found == max(1, int(share * n + 0.5))


def test_shares_of_what_stands_there_instead():
    ids, text, counts = batch([500] * 400)
    places, labels = masking(0.5)(ids, text, counts, drawn())
    now = ids[places]
    total = len(places)
    assert total == 100_000
    # A random token is the one that stood there once in a thousand times, and counts as kept.
    kept = 0.1 + 0.1 / len(ORDINARY)
    shares = {"masked": (now == MASK, 0.8), "kept": (now == labels, kept)}
    shares["random"] = ((now != MASK) & (now != labels), 1 - 0.8 - kept)
    for name, (found, expected) in shares.items():
        spread = (expected * (1 - expected) / total) ** 0.5
        assert abs(found.mean() - expected) < 5 * spread, name
    random = now[shares["random"][0]]
    assert (random >= FIRST).all()
    counts = np.bincount(random - FIRST, minlength=len(ORDINARY))
    expected = len(random) / len(ORDINARY)
    assert (abs(counts - expected) < 6 * expected**0.5).all()


@pytest.mark.parametrize("replaced", [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0)])
def test_all_masked_all_kept_all_random(replaced):
    ids, text, counts = batch([100] * 30)
    places, labels = masking(0.3, replaced)(ids, text, counts, drawn())
    if replaced[0]:
        assert (ids[places] == MASK).all()
    elif replaced[1]:
        assert (ids[places] != MASK).all() and (ids[places] != labels).mean() > 0.9
    else:
        assert (ids[places] == labels).all()


def test_each_token_is_drawn_as_often():
    """Of 20 tokens 3: 4,000 draws, 6 standard deviations for each of 40 places."""
    hits = np.zeros(44)
    for number in range(4000):
        ids, text, counts = batch([20, 20])
        places, _ = masking()(ids, text, counts, drawn(number))
        hits[places] += 1
    assert not hits[[0, 21, 22, 43]].any()
    spread = (4000 * 0.15 * 0.85) ** 0.5
    assert (abs(hits[text] - 600) < 6 * spread).all()


CONTINUES = np.zeros(VOCABULARY, bool)
CONTINUES[505:] = True  # of random ids about half: words of 2 tokens on average


def words_of(ids, text):
    """Words as lists of places; a gap in the text ends one."""
    words = []
    for place in text:
        if not CONTINUES[ids[place]] or not words or words[-1][-1] != place - 1:
            words.append([])
        words[-1].append(place)
    return words


def test_words_are_taken_whole():
    ids, text, counts = batch([200] * 60 + [1, 2, 3])
    before = ids.copy()
    places, labels = masking(0.15, (0.5, 0.5), CONTINUES)(ids, text, counts, drawn())
    assert (labels == before[places]).all() and (np.diff(places) > 0).all()
    chosen = set(places.tolist())
    words = words_of(before, text)
    longest = max(map(len, words))
    assert longest > 4
    for word in words:
        assert chosen.issuperset(word) or not chosen.intersection(word)
    for n, start in zip(counts, _starts(counts), strict=True):
        found = ((places >= start) & (places < start + n)).sum()
        assert found >= 1
        assert n < 200 or abs(found - 30) < longest
    # The expected number is 30, and each differs by less than the longest word.
    found = len(places) - (places >= _starts(counts)[60]).sum()
    assert abs(found / 60 - 30) < 5 * longest / 60**0.5


def test_words_of_one_token_are_as_many_as_tokens():
    ids, text, counts = batch([*range(1, 60)])
    places, _ = masking(0.15, (0.8, 0.1), np.zeros(VOCABULARY, bool))(ids, text, counts, drawn())
    for n, start in zip(counts, _starts(counts), strict=True):
        found = ((places >= start) & (places < start + n)).sum()
        assert found == max(1, int(0.15 * n + 0.5))


def test_each_word_is_drawn_as_often_whatever_its_length():
    """10 words of 2 tokens and 10 of 4: of 60 tokens 9."""
    ids = np.array([CLS, *[10, 600] * 10, *[10, 600, 601, 602] * 10, SEP])
    text, counts = np.arange(1, 61), np.array([60])
    hits = np.zeros(62)
    for number in range(4000):
        places, _ = masking(0.15, (1.0, 0.0), CONTINUES)(ids.copy(), text, counts, drawn(number))
        hits[places] += 1
    assert abs(hits.sum() / 4000 - 9) < 5 * 4 / 4000**0.5
    short, long = hits[1:21].mean(), hits[21:61].mean()
    assert abs(short - long) < 0.1 * long


def test_a_word_that_is_longer_than_what_is_wanted_is_taken_where_it_is_the_only_one():
    ids = np.array([CLS, 10, 600, 601, 602, SEP] * 50)
    text = np.flatnonzero(ids > SEP)
    places, _ = masking(0.15, (1.0, 0.0), CONTINUES)(ids, text, np.full(50, 4), drawn())
    assert (places == text).all()


def test_a_segment_that_begins_within_a_word_begins_one():
    ids = np.array([CLS, 10, 600, SEP, 600, 601, SEP])
    text, counts = np.array([1, 2, 4, 5]), np.array([4])
    seen = set()
    for number in range(50):
        places, _ = masking(0.5, (1.0, 0.0), CONTINUES)(ids.copy(), text, counts, drawn(number))
        seen.add(tuple(places.tolist()))
    assert seen == {(1, 2), (4, 5)}


def test_batches_are_masked_by_their_number():
    ids, text, counts = batch([100] * 5)
    made = [masking()(ids.copy(), text, counts, drawn(number))[0] for number in (0, 0, 1)]
    assert (made[0] == made[1]).all()
    assert not all(a == b for a, b in itertools.zip_longest(made[0], made[2]))
