"""Text to shards: all of it, whole or absent, the same bytes however often it was interrupted."""

import contextlib
import errno
import fcntl
import itertools
import json
import random
import shutil
from collections import namedtuple

import numpy as np
import pytest

pytest.importorskip("transformers")

from bertfast.recipes.pretrain import documents, shards
from bertfast.recipes.pretrain import prepare as preparing
from bertfast.recipes.pretrain.batches import Batches, DataOptions
from bertfast.recipes.pretrain.prepare import is_held_out, prepare
from bertfast.recipes.pretrain.sentences import sentences
from bertfast.recipes.pretrain.shards import Shards, ShardWriter
from bertfast.recipes.pretrain.vocabulary import SPECIAL

WORDS = (
    "the sun rose over an old harbour where ships lay and sailors sang of unhurried winds".split()
)
SMALL = dict(vocabulary=80, progress=False, shard_tokens=600)


def made_up(count, seed=0):
    draw = random.Random(seed)
    for _ in range(count):
        lines = (
            " ".join(draw.choices(WORDS, k=draw.randint(2, 12))).capitalize() + "."
            for _ in range(draw.randint(1, 9))
        )
        yield "\n".join(lines)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts = list(made_up(60))
    texts[50] += "\n\n\x01\x02\n\nThe sun."  # a sentence without tokens
    (folder / "a.txt").write_text("\n\n".join(texts[:40]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[40:]))
    return [folder / "a.txt", folder / "b.jsonl"]


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    prepare(files, out, **SMALL)
    return out


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != preparing.LOCK
    }


def stored(folder, split):
    """Documents of sentences of ids, read from the blocks."""
    text = Shards(folder).split(split)
    found = {}
    for block in range(text.blocks):
        tokens, bounds, pieces, first = text.read(block)
        for i, (a, b) in enumerate(itertools.pairwise(pieces)):
            cut = itertools.pairwise(bounds[a : b + 1])
            found.setdefault(first + i, []).extend(tokens[s:e].tolist() for s, e in cut)
    return [found[i] for i in range(text.documents)]


def expected(files, folder, split, held_out=0.01):
    """The same by the tokenizer alone, a sentence at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    number, found = 0, []
    for source in documents.find(files).files:
        for document in documents.read(source):
            if is_held_out(number, held_out, 0) == (split == "held-out"):
                cut = [
                    tokenizer(s, add_special_tokens=False).input_ids
                    for s in sentences(document.text)
                ]
                found.append([sentence for sentence in cut if sentence])
            number += 1
    return found


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_all_of_the_text_is_stored(files, done, split):
    found = stored(done, split)
    assert found == expected(files, done, split)
    assert len(found) == (3 if split == "held-out" else 57)
    entries = Shards(done).index["splits"][split]
    assert split == "held-out" or len(entries) > 3
    assert all(entry["tokens"] <= 600 for entry in entries)


def test_the_tokenizer_is_berts(done):
    from transformers import AutoTokenizer, BertTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(done / "tokenizer")
    assert isinstance(tokenizer, BertTokenizerFast) and len(tokenizer) == 80
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3, 4]
    ids = tokenizer("The SUN rosé", "winds").input_ids
    assert tokenizer.decode(ids) == "[CLS] the sun rose [SEP] winds [SEP]"
    made = Shards(done)
    assert (made.vocabulary, made.dtype) == (80, np.dtype("<u2"))
    assert made.special == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    continues = made.continues()
    for token, number in tokenizer.get_vocab().items():
        assert continues[number] == token.startswith("##"), token
    assert continues.any()


def test_batches_of_it(done):
    for options in (DataOptions(tokens=64, length=32, whole_words=True), DataOptions(nsp=False)):
        for split in ("train", "held-out"):
            _, batch = next(iter(Batches(done, options, split=split)))
            assert int(batch.input_ids.max()) < 80


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2, 5, 9])
@pytest.mark.parametrize("where", ["write_aside", "replace", "add"])
def test_interrupted_it_goes_on_to_the_same_bytes(files, done, tmp_path, monkeypatch, where, at):
    module, name = {
        "write_aside": (shards, "write_aside"),
        "replace": (shards.os, "replace"),
        "add": (ShardWriter, "add"),
    }[where]
    original, calls = getattr(module, name), itertools.count(1)
    at = at * 6 if where == "add" else at

    def failing(*arguments):
        if next(calls) == at:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        with pytest.raises(Killed):
            prepare(files, tmp_path, **SMALL)
    with pytest.raises(FileNotFoundError, match="isn't complete|holds no prepared text"):
        Shards(tmp_path)
    if where == "add" and at > 12:
        assert json.loads((tmp_path / "progress.json").read_text())["splits"]["train"]
    prepare(files, tmp_path, **SMALL)
    assert contents(tmp_path) == contents(done)
    Shards(tmp_path, verify=True)


def test_finished_shards_are_not_made_again(files, tmp_path, monkeypatch):
    added = []
    original = ShardWriter.add

    def counting(self, tokens, lengths):
        if len(added) == 40:
            raise Killed
        added.append(self.name)
        original(self, tokens, lengths)

    monkeypatch.setattr(ShardWriter, "add", counting)
    with pytest.raises(Killed):
        prepare(files, tmp_path, **SMALL)
    finished = json.loads((tmp_path / "progress.json").read_text())["documents"]
    assert 0 < finished < 40
    added.clear()
    monkeypatch.setattr(ShardWriter, "add", lambda *a: (added.append(1), original(*a)))
    prepare(files, tmp_path, **SMALL)
    assert len(added) == 60 - finished


def test_whole_files_are_documents(files, tmp_path):
    made = prepare(files, tmp_path, **SMALL, whole_files=True, held_out=0)
    assert made.split("train").documents == 1 + 20
    with pytest.raises(ValueError, match="whole_files was True, now False"):
        prepare(files, tmp_path, **SMALL, held_out=0)


def test_again_it_has_nothing_to_do(files, done, monkeypatch):
    before = contents(done)
    monkeypatch.setattr(preparing, "encoder", None)
    assert prepare(files, done, **SMALL).vocabulary == 80
    assert contents(done) == before


def test_other_options_or_inputs_are_told(files, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    with pytest.raises(ValueError, match=r"held_out was 0.01, now 0.1.*\(--overwrite\)"):
        prepare(files, out, **SMALL, held_out=0.1)
    with pytest.raises(ValueError, match="vocabulary was 80, now 90"):
        prepare(files, out, **{**SMALL, "vocabulary": 90})
    with pytest.raises(ValueError, match="b.jsonl was among the inputs"):
        prepare(files[:1], out, **SMALL)
    with pytest.raises(ValueError, match="inputs were in another order"):
        prepare(files[::-1], out, **SMALL)
    copy = shutil.copy(files[0], tmp_path / "a.txt")
    with pytest.raises(ValueError, match="a.txt is new among the inputs"):
        prepare([*files, copy], out, **SMALL)
    (out / "mine.txt").write_text("stays")
    prepare([copy], out, **SMALL, overwrite=True)
    with open(copy, "a") as file:
        file.write("more")
    with pytest.raises(ValueError, match="a.txt has changed"):
        prepare([copy], out, **SMALL)
    assert (out / "mine.txt").read_text() == "stays"
    fresh = tmp_path / "fresh"
    prepare([copy], out, **SMALL, overwrite=True)
    prepare([copy], fresh, **SMALL)
    (out / "mine.txt").unlink()
    assert contents(out) == contents(fresh)
    # The same text elsewhere gives the same data.
    other = shutil.copy(copy, tmp_path / "renamed.txt")
    assert prepare([other], tmp_path / "other", **SMALL).checksum == Shards(fresh).checksum
    (out / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="isn't a folder of prepared text, or is damaged"):
        prepare([copy], out, **SMALL)


def test_a_tokenizer_that_is_given(files, done, tmp_path):
    """One that cuts and fills up, as those of sentence encoders do: not so text for training."""
    from transformers import BertTokenizerFast

    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"[]abcdefghijklmnopqrstuvwxyz.,",
        "sep",
    ]
    vocabulary += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    ids = {token: i + 70_000 * (i > 50) for i, token in enumerate(vocabulary)}
    tokenizer = BertTokenizerFast(vocab=ids)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.save_pretrained(tmp_path / "given")
    text = tmp_path / "a.txt"
    text.write_text("A [SEP] in the text. Of more than four tokens.\n\nAnother.")
    made = prepare(text, tmp_path / "out", tokenizer=tmp_path / "given", progress=False)
    assert made.dtype == np.dtype("<u4") and made.vocabulary == max(ids.values()) + 1
    assert set(range(51, 70_051)) <= set(made.reserved)
    tokens = {number: token for token, number in ids.items()}
    first, second = stored(tmp_path / "out", "train")
    read = ["".join(tokens[i] for i in s).replace("##", "") for s in first]
    assert read == ["a[sep]inthetext.", "ofmorethanfourtokens."]
    assert not {0, 2, 3, 4} & {i for sentence in first + second for i in sentence}
    with pytest.raises(ValueError, match="tokenizer was .*given"):
        prepare(text, tmp_path / "out", tokenizer=done / "tokenizer", progress=False)


def test_text_is_tokenised_whole():
    from transformers import BertTokenizerFast

    from bertfast.recipes.pretrain.vocabulary import encoder

    ids = {token: i for i, token in enumerate([*SPECIAL, "a", "[", "]", "mask"])}
    tokenizer = BertTokenizerFast(vocab=ids)
    inner = tokenizer.backend_tokenizer
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    made = encoder(tokenizer)
    assert made.encode("a a a [MASK]", add_special_tokens=False).ids == [5, 5, 5, 6, 8, 7]
    assert inner.padding and inner.truncation  # the tokenizer itself is as it was


def test_wrong_tokenizers(files, tmp_path):
    from transformers import BertTokenizerFast, PreTrainedTokenizerFast

    with pytest.raises(FileNotFoundError, match="none, of tokenizer, doesn't exist"):
        prepare(files, tmp_path / "out", tokenizer=tmp_path / "none", progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="tokenizer must be a folder with one, got .*empty"):
        prepare(files, tmp_path / "out", tokenizer=tmp_path / "empty", progress=False)
    bare = PreTrainedTokenizerFast(
        tokenizer_object=BertTokenizerFast()._tokenizer, mask_token="[MASK]"
    )
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="special tokens.*without pad, cls, sep"):
        prepare(files, tmp_path / "out", tokenizer=tmp_path / "bare", progress=False)


def test_the_same_text_gives_the_same_vocabulary(files, tmp_path):
    from bertfast.recipes.pretrain.vocabulary import train

    texts = list(made_up(80, seed=1))
    made = [train(lambda: texts, 80, progress=False).get_vocab() for _ in range(3)]
    assert made[0] == made[1] == made[2] and len(made[0]) == 80
    cased = train(lambda: ["Été Été it It"] * 3, 16, lowercase=False, progress=False)
    assert "É" in cased.get_vocab() and cased.tokenize("Été") == ["Été"]


def test_vocabularies_that_dont_fit(files, tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary must be (\d+) or more .* got 30") as raised:
        prepare(files, tmp_path / "a", vocabulary=30, progress=False)
    least = int(str(raised.value).split("must be ")[1].split()[0])
    prepare(files, tmp_path / "a", vocabulary=least, progress=False)
    with pytest.raises(
        ValueError, match=r"vocabulary must be (\d+) or less .* got 30522"
    ) as raised:
        prepare(files, tmp_path / "b", progress=False)
    most = int(str(raised.value).split("must be ")[1].split()[0])
    assert prepare(files, tmp_path / "b", vocabulary=most, progress=False)


def test_held_out_documents():
    chosen = [n for n in range(10_008) if is_held_out(n, 0.01, 0)]
    assert chosen[:2] == [3, 7] and len(chosen) == 102
    assert [n for n in range(10_008) if is_held_out(n, 0.01, 1)] != chosen
    places = np.array(chosen[2:]) % 100
    assert len(set(places)) > 30  # 100 of 100: 63 are expected
    assert not any(is_held_out(n, 0, 0) for n in range(1000))
    assert sum(is_held_out(n, 0.5, 0) for n in range(1008)) == 502


def test_a_run_in_the_same_folder(files, tmp_path):
    with open(tmp_path / preparing.LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=f"another run is preparing text in {tmp_path}"):
            prepare(files, tmp_path, **SMALL)
    prepare(files, tmp_path, **SMALL)


def test_no_space_is_left(files, done, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match="needs at least 0.0 GiB"):
            prepare(files, tmp_path, **SMALL)
    original, calls = ShardWriter.add, itertools.count()

    def full(*arguments):
        if next(calls) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        with pytest.raises(OSError, match=f"no space is left to write to {tmp_path}: finished"):
            prepare(files, tmp_path, **SMALL)
    assert not list(tmp_path.glob("*.part"))
    prepare(files, tmp_path, **SMALL)
    assert contents(tmp_path) == contents(done)


def damage(path, kind):
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "short":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:5] + bytes([data[5] ^ 1]) + data[6:])


@pytest.mark.parametrize("part", ["tokens", "sentences", "documents", "blocks"])
@pytest.mark.parametrize("kind", ["missing", "short", "altered"])
def test_damaged_shards(done, tmp_path, part, kind):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    name = f"train-00001.{part}.bin"
    damage(out / name, kind)
    error = {"missing": "is missing", "short": "truncated or altered", "altered": "was altered"}
    with pytest.raises((ValueError, OSError), match=f"{name} .*{error[kind]}"):
        Shards(out, verify=kind == "altered")
    with contextlib.nullcontext() if kind == "altered" else pytest.raises((ValueError, OSError)):
        Shards(out)


def test_damaged_indexes(done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    path = out / "index.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="index.json isn't an index of prepared text"):
        Shards(out)
    path.write_text(text.replace('"mask": 4', '"mask": 5'))
    with pytest.raises(ValueError, match="index.json was altered"):
        Shards(out)
    path.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="index.json is of version 2, and this bertfast reads"):
        Shards(out)
    damage(out / "tokenizer" / "tokenizer.json", "short")
    path.write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json has .* bytes"):
        Shards(out)


BAD = [
    (dict(vocabulary=5), "vocabulary must be between 6 and"),
    (dict(held_out=0.6), "held_out must be between 0 and 0.5, got 0.6"),
    (dict(held_out=-1), "held_out must be between"),
    (dict(shard_tokens=0), "shard_tokens must be between 1 and"),
    (dict(seed=-1), "seed must be between 0"),
    (dict(lowercase="yes"), "lowercase must be a bool, got str"),
    (dict(column=3), "column must be a str, got int"),
]


@pytest.mark.parametrize(("wrong", "error"), BAD, ids=[next(iter(wrong)) for wrong, _ in BAD])
def test_arguments_are_checked(files, tmp_path, wrong, error):
    with pytest.raises((ValueError, TypeError), match=error):
        prepare(files, tmp_path / "out", progress=False, **wrong)
    assert not (tmp_path / "out").exists()


def test_bad_text_stops_it(tmp_path):
    (tmp_path / "a.txt").write_text("fine\n\nfine")
    (tmp_path / "b.txt").write_bytes(b"fine\n\nb\xff")
    with pytest.raises(ValueError, match="b.txt, line 3: must be UTF-8"):
        prepare(tmp_path, tmp_path / "out", vocabulary=20, progress=False)
    (tmp_path / "c.pdf").write_bytes(b"")
    (tmp_path / "b.txt").unlink()
    with pytest.warns(UserWarning, match="1 files of other kinds were passed over: .*c.pdf"):
        with pytest.raises(ValueError, match="vocabulary must be"):
            prepare(tmp_path, tmp_path / "out", vocabulary=20, progress=False)


def blocks_by_hand(lengths, size):
    """The starts of blocks as (sentence, document), looked for one by one."""
    starts = [(s, d) for d, document in enumerate(lengths) for s in range(len(document))]
    starts = list(enumerate(d for _, d in starts))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    begins = np.concatenate([[0], np.cumsum([len(document) for document in lengths])])[:-1]
    found = set()
    for aim in range(0, int(offsets[-1]), size):
        after = [b for b in begins if offsets[b] >= aim]
        if after and offsets[after[0]] < aim + size:
            found.add(int(after[0]))
        else:
            inside = [s for s, _ in starts if offsets[s] >= aim]
            found.update(inside[:1])
    return [(s, d) for s, d in starts if s in found] + [(len(starts), len(lengths))]


def test_blocks():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = [
            rng.integers(1, rng.integers(2, 60), rng.integers(1, rng.integers(2, 40)))
            for _ in range(rng.integers(1, 12))
        ]
        sentences_ = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        begins = np.concatenate([[0], np.cumsum([len(document) for document in lengths])])
        found = shards.blocks(sentences_, begins, 64)
        assert [tuple(row) for row in found.tolist()] == blocks_by_hand(lengths, 64)
