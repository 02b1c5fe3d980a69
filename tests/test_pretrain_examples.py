"""Sequences of a window: nothing lost, pairs that are what their label says."""

import numpy as np
import pytest

from bertfast.recipes.pretrain.draws import SEQUENCES, Draws
from bertfast.recipes.pretrain.examples import Window, _fit, pairs, spans, stretches


def window(documents, names=None):
    """Documents of sentences by their lengths; each token is its own place."""
    lengths = np.concatenate(documents)
    sentences = np.concatenate([[0], np.cumsum(lengths)])
    pieces = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    names = np.arange(len(documents)) if names is None else np.array(names)
    return Window(np.arange(sentences[-1]), sentences, pieces, names)


def some(count=400, sentences=(1, 25), length=(1, 40), seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(*length, rng.integers(*sentences, endpoint=True), endpoint=True)
        for _ in range(count)
    ]


def draws(number=0):
    return Draws(3, SEQUENCES, 0, number)


def homes(text):
    """Each token's document."""
    return np.repeat(text.documents, np.diff(text.sentences[text.pieces]))


def check_pairs(text, made, room):
    """Raises where a pair isn't what its label says."""
    a, b = made.first_length, made.second_length
    assert (a >= 1).all() and (b >= 1).all() and (a + b <= room).all()
    home = homes(text)
    for start, length in ((made.first, a), (made.second, b)):
        assert (home[start] == home[start + length - 1]).all()
    same = home[made.first] == home[made.second]
    assert (same == (made.not_next == 0)).all()
    gap = made.second - made.first - a
    follows = made.not_next == 0
    # Tokens were taken off between the two only if the pair was too long.
    assert (gap[follows] >= 0).all() and (gap[follows & (a + b < room)] == 0).all()
    assert (gap[follows] < room).all()


def share_is_half(labels):
    """Within 5 standard deviations of as many fair coins."""
    return abs(np.mean(labels) - 0.5) < 5 * 0.5 / len(labels) ** 0.5


def test_spans():
    assert spans(np.array([5, 0, 9]), np.array([3, 2, 0])).tolist() == [5, 6, 7, 0, 1]
    assert spans(np.array([], int), np.array([], int)).tolist() == []


@pytest.mark.parametrize("room", [1, 7, 64, 10_000])
def test_stretches_have_each_token_once(room):
    text = window(some())
    made = stretches(text, room)
    assert (np.sort(spans(made.first, made.first_length)) == text.tokens).all()
    ends = text.sentences[text.pieces[1:]]
    full = made.first_length == room
    assert (full | np.isin(made.first + made.first_length, ends)).all()
    assert not made.second_length.any()


@pytest.mark.parametrize("room", [4, 29, 61, 509])
@pytest.mark.parametrize("short", [0.0, 0.1, 1.0])
def test_pairs_are_what_their_label_says(room, short):
    text = window(some())
    made = pairs(text, room, short, draws())
    check_pairs(text, made, room)
    assert share_is_half(made.not_next)
    length = made.first_length + made.second_length
    if not short:
        # True pairs that don't end their document are full.
        ends = text.sentences[text.pieces[1:]]
        inside = (made.not_next == 0) & ~np.isin(made.second + made.second_length, ends)
        assert inside.any() and (length[inside] == room).mean() > 0.9
    elif short == 1 and room > 30:
        # A uniform length of 2 to room, and then up to two sentences over it.
        assert length.mean() < room / 2 + 80


def test_a_wrong_pair_is_found():
    text = window(some())
    made = pairs(text, 61, 0.1, draws())
    for swap in (0, 1):
        wrong = made._replace(not_next=made.not_next.copy())
        wrong.not_next[np.flatnonzero(made.not_next == swap)[0]] ^= 1
        with pytest.raises(AssertionError):
            check_pairs(text, wrong, 61)
    true = np.flatnonzero((made.not_next == 0) & (made.first_length + made.second_length < 61))[0]
    late = made._replace(second=made.second.copy())
    late.second[true] += 1
    with pytest.raises(AssertionError):
        check_pairs(text, late, 61)
    labels = np.zeros(1000)
    labels[:600] = 1
    assert not share_is_half(labels)


def test_pairs_lose_no_text():
    """All of the text comes as an A or as the B that follows it, if every pair fits."""
    text = window(some(length=(2, 40)))
    longest = np.diff(text.sentences[text.pieces]).max()
    made = pairs(text, 2 * int(longest) + 80, 0.0, draws())
    taken = made.not_next == 0
    seen = np.zeros(len(text.tokens), int)
    np.add.at(seen, spans(made.first, made.first_length), 1)
    np.add.at(seen, spans(made.second[taken], made.second_length[taken]), 1)
    assert seen.min() >= 1
    # The true pairs alone end each document once.
    ends = made.second[taken] + made.second_length[taken]
    assert sorted(ends) == sorted(text.sentences[text.pieces[1:]])


def test_documents_of_one_sentence():
    many = window([[20]] * 1000)
    made = pairs(many, 61, 0.1, draws())
    check_pairs(many, made, 61)
    assert share_is_half(made.not_next)
    # A single token can't be cut: its text comes before another's.
    single = window([[1]] * 50 + [[5, 5]])
    made = pairs(single, 61, 0.1, draws())
    check_pairs(single, made, 61)
    assert made.not_next[made.first < 50].all()
    assert set(made.first.tolist()) >= set(range(50))


def test_long_sentences_are_cut_and_not_lost():
    text = window([[1000], [3, 2000, 5], [10_000]])
    made = pairs(text, 29, 0.1, draws())
    check_pairs(text, made, 29)
    assert share_is_half(made.not_next)
    taken = made.not_next == 0
    seen = np.unique(
        np.concatenate(
            [
                spans(made.first, made.first_length),
                spans(made.second[taken], made.second_length[taken]),
            ]
        )
    )
    # Pairs are too long by less than a part, 3 tokens. Where two meet, both may lose as much.
    assert np.diff(seen).max() <= 5 and len(seen) > 0.85 * len(text.tokens)


def test_second_segments_come_from_all_other_documents_alike():
    """Of pieces: the parts of a long document are no other documents to each other."""
    text = window([[5] * 12] * 6, names=[0, 1, 1, 2, 3, 4])
    home = homes(text)
    found = []
    for number in range(400):
        made = pairs(text, 30, 0.0, draws(number))
        check_pairs(text, made, 30)
        random = (made.not_next == 1) & (home[made.first] == 1)
        found += home[made.second[random]].tolist()
    counts = np.bincount(found, minlength=5)
    assert counts[1] == 0
    for count in counts[[0, 2, 3, 4]]:
        assert abs(count - len(found) / 4) < 5 * (len(found) * 3 / 16) ** 0.5


def told_by_lengths(made):
    """The share of labels that are guessed right from both lengths: of every second pair, as was
    most frequent among the others."""
    lengths = made.first_length // 16 * 100 + made.second_length // 16
    learn = np.arange(len(lengths)) % 2 == 0
    counts = np.zeros((2, lengths.max() + 1))
    np.add.at(counts, (made.not_next[learn], lengths[learn]), 1)
    guess = counts[1] > counts[0]
    return (guess[lengths[~learn]] == made.not_next[~learn]).mean()


def test_lengths_tell_nothing_of_the_label():
    """They would if a random B always filled its sequence."""
    for room in (61, 253):
        made = pairs(window(some(3000, (1, 40), (3, 35))), room, 0.1, draws())
        assert told_by_lengths(made) < 0.54
    full = made._replace(
        second_length=np.where(made.not_next == 1, 253 - made.first_length, made.second_length)
    )
    assert told_by_lengths(full) > 0.58


def truncated(a, b, room):
    """BERT's truncate_seq_pair, by lengths."""
    while a + b > room:
        if a > b:
            a -= 1
        else:
            b -= 1
    return a, b


def test_pairs_are_cut_as_in_2018():
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 80, (2, 500))
    start, room = np.zeros(500, int), 61
    made = _fit(start, start + a, 100 + start, 100 + start + b, start, room, draws())
    for i in range(500):
        assert (made.first_length[i], made.second_length[i]) == truncated(a[i], b[i], room)
        assert 0 <= made.first[i] and made.first[i] + made.first_length[i] <= a[i]
        assert 100 <= made.second[i] and made.second[i] + made.second_length[i] <= 100 + b[i]
    cut = a - made.first_length
    front, end = made.first[cut > 9], (a - made.first_length - made.first)[cut > 9]
    assert (front > 0).any() and (end > 0).any()
    assert abs(front.mean() - end.mean()) < 0.2 * (front + end).mean()


def test_draws_are_a_function_of_their_place():
    one = Draws(1, 2, 3, 4)
    assert one.raw(5).tolist() == Draws(1, 2, 3, 4).raw(5).tolist()
    places = [(1, 2, 3, 4), (0, 2, 3, 4), (1, 1, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)]
    streams = [set(Draws(*place).raw(10_000).tolist()) for place in places]
    assert len(set.union(*streams)) == 50_000
    bounds = np.array([1, 2, 7] * 10_000)
    below = Draws(1, 2, 3, 4).below(bounds)
    for bound in (1, 2, 7):
        counts = np.bincount(below[bounds == bound], minlength=bound)
        assert len(counts) == bound
        spread = (10_000 / bound * (1 - 1 / bound)) ** 0.5
        assert (abs(counts - 10_000 / bound) <= 5 * spread).all()
    uniform = Draws(1, 2, 3, 4).uniform(10_000)
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / 10_000) ** 0.5
    assert sorted(Draws(1, 2, 3, 4).permutation(100)) == list(range(100))


def test_draws_stay_as_they_are():
    """An interrupted run goes on with other versions of numpy too."""
    assert Draws(1, 2, 3, 4).raw(2).tolist() == FIRST


FIRST = [11908576178598684996, 2564810913301908829]
