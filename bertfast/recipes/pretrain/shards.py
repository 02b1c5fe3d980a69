"""Tokens on disk, memory-mapped: a folder that is whole or says that it isn't.

    index.json              all that follows, with sizes and checksums; written last
    tokenizer/              a transformers tokenizer
    continues.bin           uint8 (vocabulary,): 1 for tokens that go on with a word; WordPiece only
    train-00000.tokens.bin  uint16, or uint32 for vocabularies of more than 65,536 tokens
    train-00000.sentences.bin  uint32 (sentences + 1,): where each starts in tokens
    train-00000.documents.bin  uint32 (documents + 1,): where each starts in sentences
    train-00000.blocks.bin  uint32 (blocks + 1, 2): where each starts: sentence, document
    held-out-00000....      the same of documents that are kept for evaluation

A block is some 32k tokens of neighbouring documents, the unit that is shuffled. It ends with a
document where that doesn't make it twice as long. All numbers are little-endian.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1
BLOCK = 2**15
INDEX, PROGRESS, TOKENIZER, CONTINUES = "index.json", "progress.json", "tokenizer", "continues.bin"
SPLITS = ("train", "held-out")
PARTS = ("tokens", "sentences", "documents", "blocks")
FORMAT = "bertfast pretrain"
AGAIN = "prepare the text again, with overwrite (--overwrite)"


def token_type(vocabulary: int) -> np.dtype:
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


# Writing.


def write_aside(path: Path, data: bytes) -> None:
    """A file that holds all of the data, or is as it was before."""
    aside = path.with_name(path.name + ".part")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    write_aside(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def described(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class ShardWriter:
    """One shard. Tokens are written as they come, under a name that nobody reads, until `close`."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.tokens = 0
        self._lengths: list[np.ndarray] = []  # of sentences
        self._counts: list[int] = []  # of documents' sentences
        self._hash = hashlib.sha256()
        self._file = open(self._path("tokens", ".part"), "wb")

    def _path(self, part: str, ending: str = "") -> Path:
        return self.folder / f"{self.name}.{part}.bin{ending}"

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """A document's tokens, and the lengths of its sentences, none of them 0."""
        data = tokens.astype(self.dtype).tobytes()
        self._hash.update(data)
        self._file.write(data)
        self._lengths.append(lengths)
        self._counts.append(len(lengths))
        self.tokens += len(tokens)

    def close(self) -> dict[str, Any]:
        """The shard's entry in the index."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sentences = np.concatenate([[0], np.cumsum(np.concatenate(self._lengths))])
        documents = np.concatenate([[0], np.cumsum(self._counts)])
        files = {
            "tokens": {
                "bytes": self.tokens * self.dtype.itemsize,
                "sha256": self._hash.hexdigest(),
            }
        }
        for part, bounds in zip(
            PARTS[1:], (sentences, documents, blocks(sentences, documents)), strict=True
        ):
            data = bounds.astype("<u4").tobytes()
            files[part] = described(data)
            write_aside(self._path(part), data)
        os.replace(self._path("tokens", ".part"), self._path("tokens"))
        return {
            "name": self.name,
            "tokens": self.tokens,
            "sentences": len(sentences) - 1,
            "documents": len(documents) - 1,
            "files": files,
        }

    def abandon(self) -> None:
        self._file.close()
        self._path("tokens", ".part").unlink(missing_ok=True)


def blocks(sentences: np.ndarray, documents: np.ndarray, size: int | None = None) -> np.ndarray:
    """(blocks + 1, 2): where each starts, as a sentence and the document that holds it.

    A block starts with the first document after a multiple of `size` tokens; where that is further
    away than the next multiple, within a document, at a sentence.
    """
    size = size or BLOCK
    aims = np.arange(0, sentences[-1], size)
    starts = sentences[documents[:-1]]
    after = np.searchsorted(starts, aims)
    near = after < len(starts)
    near[near] = starts[after[near]] < aims[near] + size
    first = np.searchsorted(sentences[:-1], aims)
    first[near] = documents[after[near]]
    first = np.unique(np.append(first[first < len(sentences) - 1], len(sentences) - 1))
    holds = np.searchsorted(documents, first, "right") - 1
    return np.stack([first, holds], 1)


# Reading.


class Split:
    """The documents of training, or those kept for evaluation; blocks are numbered through."""

    def __init__(self, folder: Path, entries: Sequence[dict[str, Any]], dtype: np.dtype) -> None:
        self.tokens = sum(entry["tokens"] for entry in entries)
        self.sentences = sum(entry["sentences"] for entry in entries)
        self.documents = sum(entry["documents"] for entry in entries)
        kinds = [dtype, *[np.dtype("<u4")] * 3]
        self._shards = [
            [
                np.memmap(folder / f"{entry['name']}.{part}.bin", kind, "r")
                for part, kind in zip(PARTS, kinds, strict=True)
            ]
            for entry in entries
        ]
        self._blocks = [
            np.array(shard[3], np.int64).reshape(-1, 2) for shard in self._shards
        ]  # small, and asked for all the time
        counts = [len(table) - 1 for table in self._blocks]
        self._first_block = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._first_document = np.cumsum([0, *(entry["documents"] for entry in entries)])

    @property
    def blocks(self) -> int:
        return int(self._first_block[-1])

    def _place(self, number: int) -> tuple[int, int]:
        """A block's shard, and its number there."""
        shard = int(np.searchsorted(self._first_block, number, "right")) - 1
        return shard, number - int(self._first_block[shard])

    def document_span(self, number: int) -> tuple[int, int]:
        """The first document of a block and its last, numbered through."""
        shard, block = self._place(number)
        (_, first), (end, last) = self._blocks[shard][block : block + 2]
        if self._shards[shard][2][last] == end:  # the next block begins with that document
            last -= 1
        base = int(self._first_document[shard])
        return base + int(first), base + int(last)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """A block: its tokens, where sentences and documents start in it (int64, with the end), and
        its first document, numbered through."""
        shard, block = self._place(number)
        tokens, sentences, documents, _ = self._shards[shard]
        (begin, first), (end, last) = self._blocks[shard][block : block + 2]
        bounds = np.array(sentences[begin : end + 1], np.int64)
        inner = np.array(documents[first + 1 : last + 1], np.int64)
        pieces = np.concatenate([[begin], inner[inner < end], [end]]) - begin
        text = np.array(tokens[bounds[0] : bounds[-1]])
        return text, bounds - bounds[0], pieces, int(self._first_document[shard] + first)


class Shards:
    """A folder that `prepare` made. verify: all is read once and compared with its checksums."""

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.index = index
        self.vocabulary: int = index["vocabulary"]
        self.special: dict[str, int] = index["special"]
        self.reserved: list[int] = index["reserved"]  # ids that no random token may be
        self.block: int = index["block"]
        self.checksum: str = index["checksum"]
        self.dtype = token_type(self.vocabulary)
        for name, told in self._files().items():
            _check(self.folder / name, told, verify)

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    def _files(self) -> dict[str, dict[str, Any]]:
        files = dict(self.index["files"])
        for shards in self.index["splits"].values():
            for entry in shards:
                for part, told in entry["files"].items():
                    files[f"{entry['name']}.{part}.bin"] = told
        return files

    def split(self, name: str) -> Split:
        return Split(self.folder, self.index["splits"][name], self.dtype)

    def continues(self) -> np.ndarray | None:
        """bool (vocabulary,): tokens that go on with a word; None if the tokenizer doesn't say."""
        if CONTINUES not in self.index["files"]:
            return None
        return np.fromfile(self.folder / CONTINUES, np.uint8).astype(bool)


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        if (folder / PROGRESS).exists():
            raise FileNotFoundError(
                f"{folder} isn't complete: its preparation was interrupted, and goes on when "
                "prepare is called again with the same inputs and options"
            )
        raise FileNotFoundError(f"{folder} holds no prepared text (no {INDEX}): run prepare first")
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != FORMAT:
            raise KeyError("format")
        if index["version"] != VERSION:
            raise ValueError(
                f"{path} is of version {index['version']}, and this bertfast reads version "
                f"{VERSION}; {AGAIN}"
            )
        if index["checksum"] != checksum(index):
            raise ValueError(f"{path} was altered: its checksum is another; {AGAIN}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} isn't an index of prepared text: {error!r}") from error
    return index


def checksum(index: dict[str, Any]) -> str:
    """Of all that an index tells of the data, and so of the tokens too. The same text gives the
    same, wherever it lay."""
    told = {key: value for key, value in index.items() if key not in ("checksum", "made_of")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _check(path: Path, told: dict[str, Any], verify: bool) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {AGAIN}")
    size = path.stat().st_size
    if size != told["bytes"]:
        raise ValueError(
            f"{path} has {size} bytes, and its index says {told['bytes']}: it was truncated or "
            f"altered; {AGAIN}"
        )
    if verify:
        found = hashlib.sha256()
        with open(path, "rb") as file:
            while data := file.read(2**24):
                found.update(data)
        if found.hexdigest() != told["sha256"]:
            raise ValueError(
                f"{path} was altered: its checksum is another than in the index; {AGAIN}"
            )
