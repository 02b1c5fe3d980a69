"""Documents of files: text, JSON lines, Parquet, and datasets that Hugging Face's library saved.

- Text (.txt, .text, or no ending): a document ends at an empty line or with the file; or each file
  is one, and its empty lines end paragraphs.
- JSON lines (.jsonl, .ndjson), Parquet (.parquet): each line or row is one, in the column `text` or
  another that is named.
- A folder that `Dataset.save_to_disk` wrote: as Parquet. Of several splits it is `train`.
- Another folder: its files of these kinds, in the order of their names, also in folders within.

A file that is named itself may have another ending, as .md: it is text.

Text and JSON lines may be compressed (.gz). Every error names the file and the line or row.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from ... import checks
from .. import records

KINDS = {
    ".txt": "text",
    ".text": "text",
    "": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
OTHERS = frozenset(
    (".csv", ".tsv", ".arrow", ".feather", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".lz4")
    + (".html", ".htm", ".xml", ".pdf", ".epub", ".doc", ".docx", ".npy", ".bin", ".pt")
)
LONGEST = 2**24  # characters of a document; a longer one is cut, so that memory is bounded


class Document(NamedTuple):
    source: Path
    where: str  # "line 12", "row 3"
    text: str
    done: float  # the share of the source that was read


@dataclass(frozen=True)
class Source:
    path: Path
    kind: str  # "text", "jsonl", "parquet", "arrow"

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def compressed(self) -> bool:
        return self.path.suffix == ".gz"


class Sources(NamedTuple):
    files: list[Source]
    passed_over: list[Path]  # files in folders, of other kinds


def find(inputs: Sequence[str | Path] | str | Path, without: Path | None = None) -> Sources:
    """The files of some files and folders, but for a folder within them."""
    if isinstance(inputs, (str, Path)):
        inputs = [inputs]
    if not inputs:
        raise ValueError("inputs must name at least one file or folder of text, got none")
    files: list[Source] = []
    passed_over: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found, others = _folder(path, without)
            if not found:
                names = ", ".join(other.name for other in others[:5]) or "no files"
                raise ValueError(
                    f"{path} must hold .txt, .jsonl or .parquet files, or a dataset saved by "
                    f"save_to_disk, got {names}"
                )
            files += found
            passed_over += others
        elif path.exists():
            files.append(Source(path, _kind_of_named(path)))
        else:
            raise FileNotFoundError(f"{path}, of inputs, doesn't exist")
    seen: set[Path] = set()
    for source in files:
        if source.path.resolve() in seen:
            raise ValueError(f"inputs name {source.path} twice")
        seen.add(source.path.resolve())
        if source.size == 0:
            raise ValueError(f"{source.path} is empty")
    return Sources(files, passed_over)


def _kind(path: Path) -> str | None:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    kind = KINDS.get(name.suffix.lower())
    return None if path.suffix == ".gz" and kind == "parquet" else kind


def _kind_of_named(path: Path) -> str:
    """Of a file that is named itself, whatever its ending is, if that may be one of text."""
    if path.suffix.lower() == ".json":
        return "jsonl"
    if path.suffix.lower() in OTHERS:
        raise ValueError(
            f"{path} must be text, JSON lines or Parquet (.gz at most around the former two), got "
            f"a file that ends in {path.suffix}"
        )
    return _kind(path) or "text"


def _folder(folder: Path, without: Path | None) -> tuple[list[Source], list[Path]]:
    if (folder / "dataset_dict.json").exists():
        return _dataset_of(folder), []
    if (folder / "state.json").exists():
        return _dataset(folder), []
    files, others = [], []
    left_out = None if without is None else without.resolve()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or left_out in path.resolve().parents:
            continue
        kind = _kind(path)
        if kind is None:
            others.append(path)
        else:
            files.append(Source(path, kind))
    return files, others


def _dataset_of(folder: Path) -> list[Source]:
    splits = _told(folder / "dataset_dict.json", "splits")
    if "train" not in splits and len(splits) != 1:
        raise ValueError(
            f"{folder} holds the splits {', '.join(splits)} and none is called train: name the "
            "folder of one of them"
        )
    return _dataset(folder / ("train" if "train" in splits else splits[0]))


def _dataset(folder: Path) -> list[Source]:
    files = [folder / entry["filename"] for entry in _told(folder / "state.json", "_data_files")]
    if (folder / "indices.arrow").exists():
        raise ValueError(
            f"{folder} holds a selection of rows (indices.arrow): call flatten_indices() before "
            "save_to_disk"
        )
    for path in files:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing, which {folder / 'state.json'} names")
    return [Source(path, "arrow") for path in files]


def _told(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_bytes())[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} isn't a saved dataset's: {error!r}") from error


def read(source: Source, column: str = "text", whole_files: bool = False) -> Iterator[Document]:
    """The documents of one file, in their order; at least one."""
    reader: Callable[[Source, str], Iterator[Document]] = {
        "text": _read_whole if whole_files else _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
    }[source.kind]
    found = False
    for document in reader(source, column):
        text = document.text
        if not text.isspace() and text:
            found = True
            for start in range(0, len(text), LONGEST):
                yield document._replace(text=text[start : start + LONGEST])
    if not found:
        raise ValueError(f"{source.path} has no text: all of it is empty")


# Lines.


def _lines(source: Source) -> Iterator[tuple[int, str, float]]:
    """Each line's number, its text, and the share that was read."""
    size, compressed = source.size, source.compressed
    number = 0
    with open(source.path, "rb") as raw:
        file: IO[bytes] = gzip.open(raw) if compressed else raw  # type: ignore[assignment]
        read = 0
        try:
            for number, line in enumerate(file, 1):
                read += len(line)
                done = raw.tell() if compressed else read
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text, done / size
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{source.path}, line {number}: must be UTF-8, got the byte "
                f"0x{error.object[error.start]:02x} at its position {error.start + 1}"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{source.path}, after line {number}: must be gzip's, got {error}"
            ) from error


def _read_whole(source: Source, column: str) -> Iterator[Document]:
    return _read_text(source, column, whole=True)


def _read_text(source: Source, column: str, whole: bool = False) -> Iterator[Document]:
    lines: list[str] = []
    first = length = 0
    done = 0.0
    for number, line, done in _lines(source):
        empty = line.isspace() and not (whole and lines)
        if empty or length + len(line) > LONGEST:
            if lines:
                yield Document(source.path, f"line {first}", "".join(lines), done)
            lines, length = [], 0
        if not empty:
            if not lines:
                first = number
            lines.append(line)
            length += len(line)
    if lines:
        yield Document(source.path, f"line {first}", "".join(lines), done)


def _read_jsonl(source: Source, column: str) -> Iterator[Document]:
    for number, line, done in _lines(source):
        if line.isspace():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{source.path}, {where}: must be JSON, got {error}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{source.path}, {where}: must be a JSON object, got {checks.kind(row)}"
            )
        if column not in row:
            raise ValueError(
                f"{source.path}, {where}: has no {column!r} among its columns {records.listed(row)}"
            )
        yield Document(source.path, where, _string(row[column], source, where, column), done)


def _string(value: Any, source: Source, where: str, column: str) -> str:
    try:
        return records.string(value, column)
    except ValueError as error:
        raise ValueError(f"{source.path}, {where}: {error}") from None


# Columns.


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "reading Parquet and saved datasets needs pyarrow: pip install bertfast[train]"
        ) from error
    return pyarrow


def _read_parquet(source: Source, column: str) -> Iterator[Document]:
    pa = _pyarrow()
    try:
        file = pa.parquet.ParquetFile(source.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{source.path} must be a Parquet file: {error}") from error
    with file:
        _check_column(pa, file.schema_arrow, source, column)
        rows = max(file.metadata.num_rows, 1)
        batches = file.iter_batches(1024, columns=[column])
        yield from _read_batches(pa, batches, source, column, lambda row: row / rows)


def _read_arrow(source: Source, column: str) -> Iterator[Document]:
    pa = _pyarrow()
    try:
        with pa.memory_map(str(source.path)) as file, pa.ipc.open_stream(file) as batches:
            _check_column(pa, batches.schema, source, column)
            size = source.size
            yield from _read_batches(pa, batches, source, column, lambda row: file.tell() / size)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{source.path} must be an Arrow stream: {error}") from error


def _check_column(pa: Any, schema: Any, source: Source, column: str) -> None:
    if column not in schema.names:
        raise ValueError(
            f"{source.path} has no {column!r} among its columns {records.listed(schema.names)}"
        )
    kind = schema.field(column).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(inner) not in ("string", "large_string", "string_view"):
        raise ValueError(f"{source.path}: {column!r} must be a column of strings, got {kind}")


def _read_batches(
    pa: Any, batches: Iterable, source: Source, column: str, done: Callable[[int], float]
) -> Iterator[Document]:
    row = 0
    try:
        for batch in batches:
            for value in batch.column(batch.schema.get_field_index(column)):
                where = f"row {row}"
                text = _string(value.as_py(), source, where, column)
                row += 1
                yield Document(source.path, where, text, done(row))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{source.path}, after row {row}: can't be read: {error}") from error
