"""Rows of files: a text each, perhaps with an id, read from any place on.

- Text (.txt, .text, other endings of text): each line is a row, an empty one too.
- CSV (.csv) and TSV (.tsv): with a line of column names.
- JSON lines (.jsonl, .ndjson, .json): each line that isn't empty is a row.
- Parquet (.parquet).

All but Parquet may be compressed (.gz). Every error names the file, the line or row, the column.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from ... import checks
from ..pretrain import documents

KINDS = {
    **{".txt": "text", ".text": "text", ".csv": "csv", ".tsv": "csv"},
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"},
}
CELL = 2**24  # characters of a CSV's cell, at most


class Place(NamedTuple):
    """A row's: the number of its file; where it begins there, a byte (before compression) or
    Parquet's row; and the lines before it."""

    file: int
    at: int
    line: int


class Row(NamedTuple):
    text: str
    id: Any
    end: Place  # where the next one begins, if this file has one


class Columns(NamedTuple):
    text: str
    id: str | None = None


def find(given: Path, without: Path) -> list[Path]:
    """The file, or a folder's files of these kinds by their names, but for a folder within."""
    if given.is_dir():
        found = [
            path
            for path in sorted(given.rglob("*"))
            if path.is_file()
            and kind_of(path) is not None
            and without.resolve() not in path.resolve().parents
            and not any(part.startswith(".") for part in path.relative_to(given).parts)
        ]
        if not found:
            endings = ", ".join(KINDS)
            raise ValueError(f"{given} must hold files that end in one of {endings}")
        return found
    if not given.exists():
        raise FileNotFoundError(f"{given}, the input, doesn't exist")
    if given.suffix.lower() in documents.OTHERS - {".csv", ".tsv"}:
        raise ValueError(f"{given} must be Parquet, CSV, JSON lines or text, by its ending")
    return [given]


def kind_of(path: Path) -> str | None:
    packed = path.suffix.lower() == ".gz"
    kind = KINDS.get((path.with_suffix("") if packed else path).suffix.lower())
    return None if packed and kind == "parquet" else kind


def read(paths: Sequence[Path], columns: Columns, start: Place | None = None) -> Iterator[Row]:
    """The rows of all files, one after another, from a place on."""
    start = start or Place(0, 0, 0)
    for number in range(start.file, len(paths)):
        here = start if number == start.file else Place(number, 0, 0)
        path = paths[number]
        kind = kind_of(path) or "text"
        yield from {"text": _text, "csv": _csv, "jsonl": _jsonl, "parquet": _parquet}[kind](
            path, columns, here
        )


class Table(NamedTuple):
    """All rows, looked at once."""

    rows: int
    places: list[Place]  # of the first row, and of each further one after `size` rows


def scan(paths: Sequence[Path], columns: Columns, size: int, bar: Any) -> Table:
    """Reads everything once, so that a bad row is told before anything is computed."""
    places: list[Place] = []
    count, place = 0, Place(0, 0, 0)
    kind: type | None = None
    for row in read(paths, columns):
        if row.end.file != place.file:
            place = Place(row.end.file, 0, 0)
        if columns.id is not None:
            kind = kind or type(row.id)
            if type(row.id) is not kind:
                raise ValueError(
                    f"{paths[place.file]}, near line {place.line + 1}: {columns.id!r} must be "
                    f"{checks.kind(kind())} as in the rows before, got {checks.kind(row.id)}"
                )
        if count % size == 0:
            places.append(place)
        place = row.end
        count += 1
        bar.update()
    if not count:
        raise ValueError(f"{paths[0]} has no rows" if len(paths) == 1 else "the files have no rows")
    return Table(count, places)


# Lines.


class _Lines:
    """The lines of a file from a place on; `at` and `line` tell how far it came."""

    def __init__(self, path: Path, place: Place) -> None:
        self.path, self.at, self.line = path, place.at, place.line

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as raw:
            packed = self.path.suffix.lower() == ".gz"
            file: IO[bytes] = gzip.open(raw) if packed else raw  # type: ignore[assignment]
            try:
                file.seek(self.at)
                for line in file:
                    text = line.decode("utf-8-sig" if self.line == 0 else "utf-8")
                    self.at += len(line)
                    self.line += 1
                    yield text
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path}, line {self.line + 1}: must be UTF-8, got the byte "
                    f"0x{error.object[error.start]:02x} at its position {error.start + 1}"
                ) from error
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(
                    f"{self.path}, after line {self.line}: must be gzip's, got {error}"
                ) from error

    def place(self, file: int) -> Place:
        return Place(file, self.at, self.line)


def _text(path: Path, columns: Columns, start: Place) -> Iterator[Row]:
    if columns.id is not None:
        raise ValueError(f"{path} is text, and has no column {columns.id!r} for ids")
    lines = _Lines(path, start)
    for line in lines:
        yield Row(line.rstrip("\r\n"), None, lines.place(start.file))


def _csv(path: Path, columns: Columns, start: Place) -> Iterator[Row]:
    separator = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    csv.field_size_limit(CELL)
    lines = _Lines(path, Place(start.file, 0, 0))
    names = _record(path, csv.reader(lines, delimiter=separator, strict=True), 1)
    if names is None:
        raise ValueError(f"{path} is empty, and must begin with a line of column names")
    wanted = [name for name in columns if name is not None]
    for name in wanted:
        if names.count(name) != 1:
            said = "has no" if name not in names else "has more than one"
            raise ValueError(f"{path}, line 1: {said} {name!r} among its columns {_listed(names)}")
    if start.at:
        lines = _Lines(path, start)
    else:
        begin = lines.place(start.file)
        lines = _Lines(path, begin)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        line = lines.line + 1
        cells = _record(path, reader, line)
        if cells is None:
            return
        if not cells:
            continue  # an empty line
        if len(cells) != len(names):
            raise ValueError(
                f"{path}, line {line}: has {len(cells)} cells, and line 1 names {len(names)} "
                "columns"
            )
        found = [cells[names.index(name)] for name in wanted]
        yield Row(found[0], found[1] if len(found) > 1 else None, lines.place(start.file))


def _record(path: Path, reader: Any, line: int) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: must be CSV, got {error}") from error


def _jsonl(path: Path, columns: Columns, start: Place) -> Iterator[Row]:
    lines = _Lines(path, start)
    for line in lines:
        if line.isspace():
            continue
        where = f"{path}, line {lines.line}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: must be JSON, got {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be a JSON object, got {checks.kind(row)}")
        for name in columns:
            if name is not None and name not in row:
                raise ValueError(f"{where}: has no {name!r} among its columns {_listed(row)}")
        text = _string(row[columns.text], where, columns.text)
        yield Row(text, _id(row, where, columns), lines.place(start.file))


def _string(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} must be a string, got {checks.kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can hold halves of characters; pairs become whole again
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _id(row: dict[str, Any], where: str, columns: Columns) -> Any:
    if columns.id is None:
        return None
    value = row[columns.id]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    if isinstance(value, str):
        return _string(value, where, columns.id)
    raise ValueError(
        f"{where}: {columns.id!r} must be a string or a whole number of 64 bits, got "
        f"{checks.kind(value)}"
    )


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:10])) + (", ..." if len(listed) > 10 else "") or "(none)"


# Parquet.


def _parquet(path: Path, columns: Columns, start: Place) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} must be a Parquet file: {error}") from error
    wanted = [name for name in columns if name is not None]
    with file:
        for name in wanted:
            if name not in file.schema_arrow.names:
                known = _listed(file.schema_arrow.names)
                raise ValueError(f"{path} has no {name!r} among its columns {known}")
        group, row = 0, 0
        while group < file.num_row_groups:
            size = file.metadata.row_group(group).num_rows
            if row + size > start.at:
                break
            group, row = group + 1, row + size
        groups = list(range(group, file.num_row_groups))
        try:
            for batch in file.iter_batches(1024, row_groups=groups, columns=wanted):
                lists = {name: batch.column(name).to_pylist() for name in wanted}
                for number in range(batch.num_rows):
                    row += 1
                    if row <= start.at:
                        continue
                    where = f"{path}, row {row - 1}"
                    values = {name: lists[name][number] for name in wanted}
                    text = _string(values[columns.text], where, columns.text)
                    yield Row(text, _id(values, where, columns), Place(start.file, row, row))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}, after row {row}: can't be read: {error}") from error
