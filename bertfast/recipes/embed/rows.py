"""Rows of files: a text or a pair of texts each, perhaps with an id, read from any place on."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import checks
from .. import records
from ..pretrain import documents
from ..records import Place, Record


class Row(NamedTuple):
    item: Any  # a text, or a pair of texts
    id: Any
    where: str  # "FILE, line 12"
    end: Place  # where the next one begins, if this file has one
    fault: str = ""  # why it is a bad row, which has no item


class Columns(NamedTuple):
    text: str
    id: str | None = None
    pair: str | None = None  # of second texts


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
    wanted = [name for name in (columns.text, columns.pair, columns.id) if name is not None]
    for number in range(start.file, len(paths)):
        here = start if number == start.file else Place(number, 0, 0)
        for record in records.read(paths[number], wanted, here):
            yield _row(record, columns)


def _row(record: Record, columns: Columns) -> Row:
    if record.fault:
        return Row(None, None, record.where, record.end, record.fault)
    try:
        item: Any = records.string(record.cells[columns.text], columns.text)
        if columns.pair is not None:
            item = (item, records.string(record.cells[columns.pair], columns.pair))
        id = None if columns.id is None else _id(record.cells[columns.id], columns.id)
    except ValueError as error:
        return Row(None, None, record.where, record.end, str(error))
    return Row(item, id, record.where, record.end)


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
    ids: str | None  # the kind of all ids: str or int


def scan(
    paths: Sequence[Path],
    columns: Columns,
    size: int,
    bar: Any,
    skip: Callable[[int, Row], object] | None = None,
) -> Table:
    """Reads everything once, so that a bad row is told before anything is computed. skip: is given
    each bad row with its number; None: the first one is an error."""
    places: list[Place] = []
    count, bad, place = 0, 0, Place(0, 0, 0)
    kind: type | None = None
    for row in read(paths, columns):
        if row.end.file != place.file:
            place = Place(row.end.file, 0, 0)
        if columns.id is not None and not row.fault:
            kind = kind or type(row.id)
            if type(row.id) is not kind:
                said = (checks.kind(kind()), checks.kind(row.id))
                fault = "{!r} must be {} as in the rows before, got {}".format(columns.id, *said)
                row = row._replace(fault=fault)
        if row.fault:
            if skip is None:
                raise ValueError(f"{row.where}: {row.fault}")
            skip(count, row)
            bad += 1
        if count % size == 0:
            places.append(place)
        place = row.end
        count += 1
        bar.update()
    if count == bad:
        one = f"{paths[0]} has" if len(paths) == 1 else "the files have"
        raise ValueError(f"{one} no rows" + (f" but {bad:,} bad ones" if bad else ""))
    return Table(count, places, None if kind is None else kind.__name__)
