"""Text to shards of tokens, in one pass that goes on where it was interrupted.

The steps: find the files; train the vocabulary or load the tokenizer; read documents, cut them into
sentences, tokenise these in batches (on all cores, by the tokenizers library), write shards. After
each shard `progress.json` tells how far it came; what is written after that is written again in the
same way. `index.json` comes last, and a folder without it isn't read.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ... import checks
from .. import folders
from . import documents, shards
from .documents import Document, Source
from .prefetch import Prefetch
from .sentences import sentences
from .shards import Shards, ShardWriter
from .vocabulary import SPECIAL, describe, encoder, load, train

LOCK = ".lock"
INPUTS = "inputs.json"  # the files, with their sizes and times
BATCH = 2**20  # characters tokenised at once


def prepare(
    inputs: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocabulary: int = 30522,
    lowercase: bool = True,
    column: str = "text",
    whole_files: bool = False,
    held_out: float = 0.01,
    seed: int = 0,
    shard_tokens: int = 2**27,
    vocabulary_characters: int = 2 * 10**8,
    overwrite: bool = False,
    progress: bool = True,
) -> Shards:
    """Text files to a folder of memory-mapped tokens, which `Batches` reads.

    Called again with the same inputs and options, it goes on after the last finished shard, or
    returns at once if all is done. With others it raises, unless overwrite is set.

    Args:
        inputs: files or folders of text, JSON lines or Parquet, or folders that `save_to_disk` of
            Hugging Face's datasets wrote (`documents.py` says more).
        out: the folder to write, made if need be.
        tokenizer: a folder with a transformers tokenizer. None: WordPiece is trained on the text.
        vocabulary: tokens of the vocabulary that is trained, special tokens included.
        lowercase: the vocabulary that is trained takes capitals for small letters, and no accents.
        column: of JSON lines, Parquet and saved datasets: which holds the text.
        whole_files: a text file is one document. Otherwise a document ends at an empty line.
        held_out: the share of documents that are kept for evaluation: one of each 1 / held_out,
            drawn by seed, after the fourth and the eighth, so that small texts have some too.
        seed: of that draw.
        shard_tokens: the most tokens of a shard; a document that is longer has one by itself.
        vocabulary_characters: about how much text the vocabulary is trained on: where there is
            more, documents are drawn.
        overwrite: removes what an earlier call made in `out` of other inputs or options.
        progress: shows a progress bar.

    Raises:
        ValueError, TypeError: an argument or a file is wrong; the message names it and the line.
        OSError: a file can't be read, or the disk is full.
    """
    out = Path(out)
    checks.check_int("vocabulary", vocabulary, len(SPECIAL) + 1, 2**31 - 1)
    checks.check_number("held_out", held_out, 0, 0.5)
    checks.check_int("seed", seed, 0, 2**63 - 1)
    checks.check_int("shard_tokens", shard_tokens, 1, 2**31)
    checks.check_int("vocabulary_characters", vocabulary_characters, 1)
    if not isinstance(column, str):
        raise TypeError(f"column must be a str, got {checks.kind(column)}")
    flags = dict(lowercase=lowercase, whole_files=whole_files, overwrite=overwrite)
    for name, value in {**flags, "progress": progress}.items():
        checks.check_bool(name, value)
    found = documents.find(inputs, without=out)
    if found.passed_over:
        names = ", ".join(map(str, found.passed_over[:5]))
        more = ", ..." if len(found.passed_over) > 5 else ""
        warnings.warn(
            f"{len(found.passed_over)} files of other kinds were passed over: {names}{more}",
            stacklevel=2,
        )
    options = Options(
        _told(tokenizer) if tokenizer is not None else None,
        vocabulary if tokenizer is None else None,
        lowercase if tokenizer is None else None,
        vocabulary_characters if tokenizer is None else None,
        column,
        whole_files,
        float(held_out),
        seed,
        shard_tokens,
    )
    busy = f"another run is preparing text in {out}"
    with folders.alone(out / LOCK, busy), _room(out):
        run = _Run(found.files, out, options, progress)
        state = run.begin(overwrite)
        if state is not None:
            if not state["tokenizer"]:
                made = run.train() if tokenizer is None else load(tokenizer)
                run.keep_tokenizer(state, made)
            run.tokenise(state)
            run.finish(state)
    return Shards(out)


@dataclass(frozen=True)
class Options:
    """Beside the files all that decides the folder's bytes."""

    tokenizer: list[str] | None
    vocabulary: int | None
    lowercase: bool | None
    vocabulary_characters: int | None
    column: str
    whole_files: bool
    held_out: float
    seed: int
    shard_tokens: int


def is_held_out(number: int, share: float, seed: int) -> bool:
    """True for a document that is kept for evaluation, by its number in the order of reading."""
    if share == 0:
        return False
    if number < 8:
        return number in (3, 7)
    length = round(1 / share)
    stretch, place = divmod(number - 8, length)
    drawn = hashlib.blake2b(f"{seed} {stretch}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "little") % length == place


class _Small(OSError):
    """The disk is too small, as can be told before."""


class _Cut(NamedTuple):
    """A document as sentences."""

    file: int
    within: int  # documents of that file before this one
    number: int  # documents before this one
    sentences: list[str]


class _Tokenised(NamedTuple):
    file: int
    within: int
    number: int
    tokens: np.ndarray
    lengths: np.ndarray  # of its sentences


class _Run:
    def __init__(self, files: list[Source], out: Path, options: Options, progress: bool) -> None:
        self.files, self.out, self.options, self.progress = files, out, options, progress
        self.dtype = np.dtype("<u2")

    # States.

    def begin(self, overwrite: bool) -> dict[str, Any] | None:
        """The state of the work; None if all is done."""
        inputs = [[str(file.path), file.size, file.path.stat().st_mtime_ns] for file in self.files]
        listed = json.dumps(inputs, indent=0).encode()
        made_of: dict[str, Any] = {
            "options": asdict(self.options),
            "inputs": hashlib.sha256(listed).hexdigest(),
        }
        for name in (shards.INDEX, shards.PROGRESS):
            path = self.out / name
            if not path.exists():
                continue
            if overwrite:
                self._remove()
                break
            try:
                state = json.loads(path.read_bytes())
                changed = _changed_options(state["made_of"]["options"], made_of["options"])
                if state["made_of"]["inputs"] != made_of["inputs"]:
                    before = json.loads((self.out / INPUTS).read_bytes())
                    different = folders.changed_inputs(before, inputs)
                    changed += different or ["the inputs were in another order"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.out} isn't a folder of prepared text, or is damaged: {error!r}. Give "
                    "overwrite (--overwrite), or another folder"
                ) from error
            if changed and name == shards.PROGRESS and not state["tokenizer"]:
                break  # nothing was made of the others yet
            if changed:
                raise ValueError(
                    f"{self.out} was prepared of other inputs or with other options: "
                    f"{'; '.join(changed)}. Give overwrite (--overwrite), or another folder"
                )
            return None if name == shards.INDEX else state
        self._check_space()
        shards.write_aside(self.out / INPUTS, listed)
        state = {
            "made_of": made_of,
            "tokenizer": False,
            "splits": {name: [] for name in shards.SPLITS},
            "next": [0, 0],  # a file, and documents of it that are done
            "documents": 0,
        }
        self._save(state)
        return state

    def _save(self, state: dict[str, Any]) -> None:
        shards.write_json(self.out / shards.PROGRESS, state)

    def _remove(self) -> None:
        """Removes what an earlier call made, and nothing else. The index goes first."""
        for name in (shards.INDEX, shards.PROGRESS, shards.CONTINUES, INPUTS):
            (self.out / name).unlink(missing_ok=True)
        for split in shards.SPLITS:
            for part in shards.PARTS:
                for path in self.out.glob(f"{split}-[0-9]*.{part}.bin*"):
                    path.unlink()
        for name in (shards.TOKENIZER, shards.TOKENIZER + ".part"):
            if (self.out / name).exists():
                shutil.rmtree(self.out / name)

    def _check_space(self) -> None:
        """Against what is needed at least: 2 bytes for each 6 of text that isn't compressed."""
        plain = [file for file in self.files if file.kind == "text" and not file.compressed]
        needed = sum(file.size for file in plain) // 3
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise _Small(
                errno.ENOSPC,
                f"{self.out} needs at least {needed / 2**30:.1f} GiB for this text, and "
                f"{free / 2**30:.1f} GiB are free",
            )

    # The tokenizer.

    def train(self) -> Any:
        options = self.options
        assert options.vocabulary and options.vocabulary_characters
        assert options.lowercase is not None
        share = min(1.0, options.vocabulary_characters / sum(file.size for file in self.files))
        return train(
            lambda: self._sample(share),
            options.vocabulary,
            lowercase=options.lowercase,
            progress=self.progress,
        )

    def _sample(self, share: float) -> Iterator[str]:
        """The text of documents of training, some of them if share is less than 1."""
        drawn = np.random.Philox(key=self.options.seed).random_raw
        with self._bar("vocabulary") as bar:
            for number, (_, _, document) in enumerate(self._read([0, 0], bar)):
                if not is_held_out(number, self.options.held_out, self.options.seed):
                    if share == 1 or drawn() < share * 2**64:
                        yield document.text

    def keep_tokenizer(self, state: dict[str, Any], tokenizer: Any) -> None:
        described = describe(tokenizer)
        aside = self.out / (shards.TOKENIZER + ".part")
        for old in (aside, self.out / shards.TOKENIZER):
            if old.exists():
                shutil.rmtree(old)
        tokenizer.save_pretrained(aside)
        os.replace(aside, self.out / shards.TOKENIZER)
        if described.continues is not None:
            data = np.array(described.continues, np.uint8).tobytes()
            shards.write_aside(self.out / shards.CONTINUES, data)
        state["tokenizer"] = True
        self._save(state)

    # Tokens.

    def tokenise(self, state: dict[str, Any]) -> None:
        """Writes all shards that are missing."""
        tokenizer = load(self.out / shards.TOKENIZER)
        self.dtype = shards.token_type(describe(tokenizer).size)
        writers: dict[str, ShardWriter] = {}
        options = self.options
        try:
            with (
                self._bar("tokens") as bar,
                contextlib.closing(self._tokenised(encoder(tokenizer), state, bar)) as found,
            ):
                for document in found:
                    held_out = is_held_out(document.number, options.held_out, options.seed)
                    split = shards.SPLITS[held_out]
                    writer = writers.get(split)
                    if writer and writer.tokens + len(document.tokens) > options.shard_tokens:
                        here = [document.file, document.within]
                        self._close(writers, state, here, document.number)
                    if split not in writers:
                        name = f"{split}-{len(state['splits'][split]):05d}"
                        writers[split] = ShardWriter(self.out, name, self.dtype)
                    writers[split].add(document.tokens, document.lengths)
                self._close(writers, state, [len(self.files), 0], -1)
        finally:
            for writer in writers.values():
                writer.abandon()

    def _close(
        self,
        writers: dict[str, ShardWriter],
        state: dict[str, Any],
        following: list[int],
        number: int,
    ) -> None:
        """Both splits' shards at once, so that one place says where to go on."""
        entries = {split: writer.close() for split, writer in writers.items()}
        writers.clear()
        for split, entry in entries.items():
            state["splits"][split].append(entry)
        state["next"], state["documents"] = following, number
        self._save(state)

    def _tokenised(
        self, tokenizer: Any, state: dict[str, Any], bar: Any
    ) -> Generator[_Tokenised, None, None]:
        """Documents with at least one token, from where the state says. The next ones are read and
        cut into sentences meanwhile."""
        ahead = Prefetch(self._cut(state, bar), 2)
        try:
            for held in ahead:
                yield from _encode(tokenizer, held)
        finally:
            ahead.close()

    def _cut(self, state: dict[str, Any], bar: Any) -> Iterator[list[_Cut]]:
        """Documents as sentences, in lists of some characters."""
        held: list[_Cut] = []
        characters = 0
        for number, (file, within, document) in enumerate(
            self._read(state["next"], bar), state["documents"]
        ):
            held.append(_Cut(file, within, number, list(sentences(document.text))))
            characters += len(document.text)
            if characters >= BATCH:
                yield held
                held, characters = [], 0
        yield held

    def _read(self, start: Sequence[int], bar: Any) -> Iterator[tuple[int, int, Document]]:
        """Documents with their file's number and their own number in it."""
        before = sum(file.size for file in self.files[: start[0]])
        for number in range(start[0], len(self.files)):
            file = self.files[number]
            skipped = start[1] if number == start[0] else 0
            found = documents.read(file, self.options.column, self.options.whole_files)
            for within, document in enumerate(found):
                bar.update(before + int(document.done * file.size) - bar.n)
                if within >= skipped:
                    yield number, within, document
            before += file.size
            bar.update(before - bar.n)

    def _bar(self, what: str) -> Any:
        from tqdm import tqdm

        total = sum(file.size for file in self.files)
        return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not self.progress)

    # The end.

    def finish(self, state: dict[str, Any]) -> None:
        if not any(state["splits"].values()):
            raise ValueError(
                "the text of inputs must have tokens, and for this tokenizer all of it is empty"
            )
        described = describe(load(self.out / shards.TOKENIZER))
        files = {}
        for path in sorted((self.out / shards.TOKENIZER).iterdir()):
            files[f"{shards.TOKENIZER}/{path.name}"] = shards.described(path.read_bytes())
        if described.continues is not None:
            data = (self.out / shards.CONTINUES).read_bytes()
            files[shards.CONTINUES] = shards.described(data)
        index = {
            "format": shards.FORMAT,
            "version": shards.VERSION,
            "vocabulary": described.size,
            "special": described.special,
            "reserved": described.reserved,
            "block": shards.BLOCK,
            "files": files,
            "splits": state["splits"],
            "made_of": state["made_of"],
        }
        index["checksum"] = shards.checksum(index)
        shards.write_json(self.out / shards.INDEX, index)
        (self.out / shards.PROGRESS).unlink(missing_ok=True)


def _encode(tokenizer: Any, held: list[_Cut]) -> Iterator[_Tokenised]:
    texts = list(itertools.chain.from_iterable(cut.sentences for cut in held))
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = (one.ids for one in encoded)
    for cut in held:
        these = list(itertools.islice(ids, len(cut.sentences)))
        lengths = np.fromiter(map(len, these), np.int64, len(these))
        tokens = np.fromiter(itertools.chain.from_iterable(these), np.int64, int(lengths.sum()))
        if len(tokens):
            yield _Tokenised(cut.file, cut.within, cut.number, tokens, lengths[lengths > 0])


def _told(tokenizer: str | Path) -> list[str]:
    """A tokenizer's name, and the checksum of its file."""
    path = Path(tokenizer) / "tokenizer.json"
    return [str(tokenizer), hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""]


def _changed_options(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {before.get(name)}, now {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, _Small):
            raise OSError(
                error.errno,
                f"no space is left to write to {folder}: finished shards are kept; make room and "
                "call prepare again",
            ) from error
        raise
