"""Rows of files: a text each, perhaps with an id, read from any place on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import checks
from .. import records
from ..pretrain import documents
from ..records import Place, Record


class Row(NamedTuple):
    text: str
    id: Any
    end: Place  # where the next one begins, if this file has one


class Columns(NamedTuple):
    text: str
    id: str | None = None


def find(given: Path, without: Path) -> list[Path]:
    """The file, or a folder's files by their names, but for a folder within."""
    if given.is_dir():
        return records.in_folder(given, without)
    if not given.exists():
        raise FileNotFoundError(f"{given}, the input, doesn't exist")
    if given.suffix.lower() in documents.OTHERS - {".csv", ".tsv"}:
        raise ValueError(f"{given} must be Parquet, CSV, JSON lines or text, by its ending")
    return [given]


def read(paths: Sequence[Path], columns: Columns, start: Place | None = None) -> Iterator[Row]:
    """The rows of all files, one after another, from a place on."""
    start = start or Place(0, 0, 0)
    wanted = [name for name in columns if name is not None]
    for number in range(start.file, len(paths)):
        here = start if number == start.file else Place(number, 0, 0)
        for record in records.read(paths[number], wanted, here):
            yield _row(record, columns)


def _row(record: Record, columns: Columns) -> Row:
    try:
        if record.fault:
            raise ValueError(record.fault)
        text = records.string(record.cells[columns.text], columns.text)
        id = None if columns.id is None else _id(record.cells[columns.id], columns.id)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from error
    return Row(text, id, record.end)


def _id(value: Any, column: str) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    if isinstance(value, str):
        return records.string(value, column)
    raise ValueError(
        f"{column!r} must be a string or a whole number of 64 bits, got {checks.kind(value)}"
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
