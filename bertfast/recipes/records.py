"""Records of files: cells by the names of columns, read from any place on.

- Text (.txt, .text, other endings of text): each line is a record of one column, an empty one too.
- CSV (.csv) and TSV (.tsv): with a line of column names, or with columns 1, 2, ...
- JSON lines (.jsonl, .ndjson, .json): each line that isn't empty is a record.
- Parquet (.parquet).

All but Parquet may be compressed (.gz). What is wrong with a file is an error that names it; what
is wrong with a record is its `fault`, and reading goes on behind it.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from .. import checks

KINDS = {
    **{".txt": "text", ".text": "text", ".csv": "csv", ".tsv": "csv"},
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"},
}
CELL = 2**24  # characters of a CSV's cell, at most


class Place(NamedTuple):
    """A record's: the number of its file; where it begins there, a byte (before compression) or
    Parquet's row; and the lines before it."""

    file: int
    at: int
    line: int


class Record(NamedTuple):
    cells: dict[str, Any]
    where: str  # "FILE, line 12"
    end: Place  # where the next one begins, if this file has one
    fault: str = ""  # why it has no cells


class Form(NamedTuple):
    """The form of CSV and TSV."""

    header: bool = True  # line 1 names the columns
    quotes: bool = True  # "..." around a cell isn't part of it


def kind_of(path: Path) -> str | None:
    packed = path.suffix.lower() == ".gz"
    kind = KINDS.get((path.with_suffix("") if packed else path).suffix.lower())
    return None if packed and kind == "parquet" else kind


def in_folder(folder: Path, without: Path | None = None) -> list[Path]:
    """Its files of these kinds by their names, but for hidden ones and a folder within."""
    left_out = None if without is None else without.resolve()
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and kind_of(path) is not None
        and left_out not in path.resolve().parents
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise ValueError(f"{folder} must hold files that end in one of {', '.join(KINDS)}")
    return found


def read(
    path: Path,
    columns: Sequence[str] | None,
    start: Place | None = None,
    form: Form = Form(),  # noqa: B008
) -> Iterator[Record]:
    """The records of one file from a place on. columns: those that each must have; None: all that
    there are. A text file's one column is the first of them, or `text`."""
    start = start or Place(0, 0, 0)
    kind = kind_of(path) or "text"
    if kind == "csv":
        return _csv(path, columns, start, form)
    return {"text": _text, "jsonl": _jsonl, "parquet": _parquet}[kind](path, columns, start)


def string(value: Any, column: str) -> str:
    """The cell, which must be a string."""
    if not isinstance(value, str):
        raise ValueError(f"{column!r} must be a string, got {checks.kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can hold halves of characters; pairs become whole again
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def listed(names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join(map(repr, known[:10])) + (", ..." if len(known) > 10 else "") or "(none)"


# Lines.


class _Lines:
    """The lines of a file from a place on; `at` and `line` tell how far it came. `fault`: what is
    wrong with a line since it was last taken."""

    def __init__(self, path: Path, place: Place) -> None:
        self.path, self.at, self.line = path, place.at, place.line
        self._fault = ""

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as raw:
            packed = self.path.suffix.lower() == ".gz"
            file: IO[bytes] = gzip.open(raw) if packed else raw  # type: ignore[assignment]
            try:
                file.seek(self.at)
                for line in file:
                    self.at += len(line)
                    self.line += 1
                    yield self._decoded(line)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(
                    f"{self.path}, after line {self.line}: must be gzip's, got {error}"
                ) from error

    def _decoded(self, line: bytes) -> str:
        encoding = "utf-8-sig" if self.line == 1 else "utf-8"
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            self._fault = self._fault or (
                f"line {self.line}: must be UTF-8, got the byte "
                f"0x{error.object[error.start]:02x} at its position {error.start + 1}"
            )
            return line.decode(encoding, "replace")

    def fault(self) -> str:
        found, self._fault = self._fault, ""
        return found

    def place(self, file: int) -> Place:
        return Place(file, self.at, self.line)

    def bad(self, file: int, fault: str) -> Record:
        """fault: "line 12: what is wrong"."""
        line, _, reason = fault.partition(": ")
        return Record({}, f"{self.path}, {line}", self.place(file), reason)


def _text(path: Path, columns: Sequence[str] | None, start: Place) -> Iterator[Record]:
    names = ["text"] if columns is None else columns
    if names[1:]:
        raise ValueError(f"{path} is text, and has no column {names[1]!r} beside its lines")
    lines = _Lines(path, start)
    for line in lines:
        if fault := lines.fault():
            yield lines.bad(start.file, fault)
            continue
        cells = {names[0]: line.rstrip("\r\n")}
        yield Record(cells, f"{path}, line {lines.line}", lines.place(start.file))


def _csv(path: Path, columns: Sequence[str] | None, start: Place, form: Form) -> Iterator[Record]:
    separator = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    csv.field_size_limit(CELL)

    def reader(lines: _Lines) -> Any:
        quoting: Any = csv.QUOTE_MINIMAL if form.quotes else csv.QUOTE_NONE
        return csv.reader(lines, delimiter=separator, strict=True, quoting=quoting)

    lines = _Lines(path, Place(start.file, 0, 0))
    names, fault = _cells(lines, reader(lines), 1)
    if fault:
        raise ValueError(f"{path}, {fault}")
    if names is None:
        raise ValueError(f"{path} is empty, and must begin with a line of column names")
    if not form.header:
        names = [str(number + 1) for number in range(len(names))]
        lines = _Lines(path, Place(start.file, 0, 0))
    for name in names if columns is None else columns:
        if names.count(name) != 1:
            said = "has no" if name not in names else "has more than one"
            raise ValueError(f"{path}, line 1: {said} {name!r} among its columns {listed(names)}")
    lines = _Lines(path, start if start.at else lines.place(start.file))
    wanted = {name: names.index(name) for name in (names if columns is None else columns)}
    rows = reader(lines)
    while True:
        line = lines.line + 1
        cells, fault = _cells(lines, rows, line)
        if fault:
            yield lines.bad(start.file, fault)
        elif cells is None:
            return
        elif not cells:
            continue  # an empty line
        elif len(cells) != len(names):
            reason = f"has {len(cells)} cells, and line 1 {'names' if form.header else 'has'}"
            yield lines.bad(start.file, f"line {line}: {reason} {len(names)} columns")
        else:
            found = {name: cells[place] for name, place in wanted.items()}
            yield Record(found, f"{path}, line {line}", lines.place(start.file))


def _cells(lines: _Lines, rows: Any, line: int) -> tuple[list[str] | None, str]:
    """The cells of a reader's row, or None at its end; and what is wrong with it."""
    try:
        cells = next(rows, None)
    except csv.Error as error:
        return [], lines.fault() or f"line {line}: must be CSV, got {error}"
    return cells, lines.fault()


def _jsonl(path: Path, columns: Sequence[str] | None, start: Place) -> Iterator[Record]:
    lines = _Lines(path, start)
    for line in lines:
        where = f"line {lines.line}"
        if fault := lines.fault():
            yield lines.bad(start.file, fault)
            continue
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield lines.bad(start.file, f"{where}: must be JSON, got {error}")
            continue
        if not isinstance(row, dict):
            fault = f"{where}: must be a JSON object, got {checks.kind(row)}"
            yield lines.bad(start.file, fault)
            continue
        absent = [name for name in columns or () if name not in row]
        if absent:
            fault = f"{where}: has no {absent[0]!r} among its columns {listed(row)}"
            yield lines.bad(start.file, fault)
            continue
        yield Record(row, f"{path}, {where}", lines.place(start.file))


# Parquet.


def _parquet(path: Path, columns: Sequence[str] | None, start: Place) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} must be a Parquet file: {error}") from error
    with file:
        known = file.schema_arrow.names
        for name in columns or ():
            if name not in known:
                raise ValueError(f"{path} has no {name!r} among its columns {listed(known)}")
        names = list(dict.fromkeys(known if columns is None else columns))
        group, row = 0, 0
        while group < file.num_row_groups:
            size = file.metadata.row_group(group).num_rows
            if row + size > start.at:
                break
            group, row = group + 1, row + size
        groups = list(range(group, file.num_row_groups))
        try:
            for batch in file.iter_batches(1024, row_groups=groups, columns=names):
                lists = {name: batch.column(name).to_pylist() for name in names}
                for number in range(batch.num_rows):
                    row += 1
                    if row <= start.at:
                        continue
                    cells = {name: lists[name][number] for name in names}
                    yield Record(cells, f"{path}, row {row - 1}", Place(start.file, row, row))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}, after row {row}: can't be read: {error}") from error
