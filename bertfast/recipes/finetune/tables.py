"""Tables of labelled texts: rows by the roles of their columns, and what is wrong with the others.

Roles are found by the columns' usual names, or by what stands in them, or are given. Besides what
`records` reads, there are CoNLL (.conll, .iob, .bio: a word and its tag a line, an empty line
between sentences) and SQuAD's JSON.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...commands.errors import UserError
from .. import records
from ..pretrain.options import flag
from ..records import Form

CONLL = (".conll", ".iob", ".bio")
LOOKED_AT = 200  # records whose cells tell what a column is
SPLITS = {"train": "train", "validation": "(valid|dev|val)", "test": "test"}


class Role(NamedTuple):
    """A column's: its usual names, best first; needed: for training, for predicting."""

    names: Sequence[str]
    needed: tuple[bool, bool] = (True, True)


class Row(NamedTuple):
    number: int  # among all of the file, or files, from 0
    example: Any
    id: Any = None


class Bad(NamedTuple):
    where: str
    reason: str


class Table(NamedTuple):
    rows: list[Row]
    bad: list[Bad]
    columns: dict[str, str]  # role -> column
    found: set[str]  # roles that were not given


def splits(data: Path) -> dict[str, list[Path]]:
    """The files of training, and of validation and test where a folder has such by their names."""
    if not data.is_dir():
        if not data.exists():
            raise UserError(f"--data: {data} doesn't exist")
        return {"train": [data]}
    files = [path for path in sorted(data.iterdir()) if path.is_file() and _kind(path)]
    found = {
        name: named
        for name, start in SPLITS.items()
        if (named := [path for path in files if re.match(start, path.name.lower())])
    }
    if "train" not in found:
        if found or not files:
            raise UserError(
                f"--data: {data} must hold files of training data called train.csv, .tsv, .jsonl, "
                f".parquet or the like, got {', '.join(p.name for p in files[:5]) or 'none'}"
            )
        return {"train": files}
    return found


def _kind(path: Path) -> str | None:
    if path.suffix.lower() in CONLL:
        return "conll"
    return records.kind_of(path)


def read(
    paths: Sequence[Path],
    roles: dict[str, Role],
    given: dict[str, str],
    parse: Callable[[dict[str, Any]], Any],
    *,
    form: Form,
    labelled: bool,
    skip_bad: bool,
    id: str | None = None,
    usual: dict[str, str] | None = None,
) -> Table:
    """The rows of files, each as `parse` makes it of its cells by their roles. parse raises
    ValueError for a row that is wrong, which ends the reading unless skip_bad is set. usual: the
    columns that the model was trained with."""
    rows: list[Row] = []
    bad: list[Bad] = []
    columns: dict[str, str] = {}
    found: set[str] = set()
    number = -1
    for path in paths:
        ahead, reading = _opened(path, form)
        if ahead:  # else all that was looked at is wrong, and says so below
            columns, found = _roles(path, ahead, roles, given, labelled, usual)
        if id is not None and all(id not in cells for cells in ahead):
            raise UserError(f"--id: {path} has no column {id!r} among {records.listed(*ahead[:1])}")
        for cells, where, fault in reading:
            number += 1
            try:
                example = parse(_by_role(cells, columns, roles, labelled, fault))
            except ValueError as error:
                if not skip_bad:
                    quoted = bool(fault) and form.quotes and records.kind_of(path) == "csv"
                    hint = " --no-quotes reads quotation marks as text;" if quoted else ""
                    raise UserError(
                        f"{where}: {error};{hint} --skip-bad leaves such rows out"
                    ) from None
                bad.append(Bad(where, str(error)))
                continue
            rows.append(Row(number, example, None if id is None else cells.get(id)))
    if not rows:
        line_1 = form.header and not bad and records.kind_of(paths[0]) == "csv"
        raise UserError(
            f"{paths[0]} has no rows"
            + (" that are right" if bad else "")
            + ("; --no-header, if line 1 is a row" if line_1 else "")
        )
    return Table(rows, bad, columns, found)


def _by_role(
    cells: dict[str, Any],
    columns: dict[str, str],
    roles: dict[str, Role],
    labelled: bool,
    fault: str,
) -> dict[str, Any]:
    if fault:
        raise ValueError(fault)
    for role, column in columns.items():
        if column not in cells and roles[role].needed[not labelled]:
            raise ValueError(f"has no {column!r} among its columns {records.listed(cells)}")
    return {role: cells[column] for role, column in columns.items() if column in cells}


# A record: its cells, where it stands, and what is wrong with it.
_Read = tuple[Any, str, str]


def _opened(path: Path, form: Form) -> tuple[list[dict[str, Any]], Iterator[_Read]]:
    """Cells of the first records, to find roles by, and all records."""
    reading = _told(path, form)
    ahead = list(itertools.islice(reading, LOOKED_AT))
    return [cells for cells, _, fault in ahead if not fault], itertools.chain(ahead, reading)


def _told(path: Path, form: Form) -> Iterator[_Read]:
    """Errors of files as the command's own."""
    if not path.exists():
        raise UserError(f"{path} doesn't exist")
    try:
        yield from _read(path, form)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None


def _read(path: Path, form: Form) -> Iterator[_Read]:
    kind = _kind(path)
    if kind == "conll":
        yield from _conll(path)
    elif kind is None or kind == "text":
        raise UserError(
            f"{path} must be CSV, TSV, JSON lines, Parquet, CoNLL or SQuAD's JSON, by its ending"
        )
    elif path.suffix.lower() == ".json" and (whole := _whole(path)) is not None:
        for number, cells in enumerate(whole):
            fault = "" if isinstance(cells, dict) else "must be a JSON object"
            yield cells, f"{path}, record {number}", fault
    else:
        for record in records.read(path, None, form=form):
            yield record.cells, record.where, record.fault


def _whole(path: Path) -> list[Any] | None:
    """The records of a file that is one JSON value: a list of them, or SQuAD's; None: it is of
    lines."""
    try:
        told = json.loads(path.read_bytes())
    except ValueError:
        return None
    if isinstance(told, list):
        return told
    if not isinstance(told, dict) or not isinstance(told.get("data"), list):
        return None
    try:
        return [
            {"context": paragraph["context"], **question}
            for article in told["data"]
            for paragraph in article.get("paragraphs", [])
            for question in paragraph["qas"]
        ] or told["data"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} must be of SQuAD's form, and has no {error}") from None


def _conll(path: Path) -> Iterator[_Read]:
    words: list[str] = []
    tags: list[str] = []
    first = 0
    fault = ""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(itertools.chain(file, [""]), 1):
            cells = line.split()
            if cells and cells[0] == "-DOCSTART-":
                continue
            if not cells:
                if words or fault:
                    yield {"tokens": words, "tags": tags}, f"{path}, line {first}", fault
                words, tags, fault = [], [], ""
            else:
                first = first if words else number
                if len(cells) == 1:
                    fault = fault or f"line {number} must have a word and its tag, got {cells[0]!r}"
                words.append(cells[0])
                tags.append(cells[-1])


def _roles(
    path: Path,
    ahead: list[dict[str, Any]],
    roles: dict[str, Role],
    given: dict[str, str],
    labelled: bool,
    usual: dict[str, str] | None,
) -> tuple[dict[str, str], set[str]]:
    """Role -> column, and which of these were found."""
    known = list(dict.fromkeys(itertools.chain.from_iterable(ahead)))
    by_lower = {name.lower(): name for name in reversed(known)}
    columns: dict[str, str] = {}
    for role, name in given.items():
        if name not in known:
            raise UserError(
                f"{flag(role)}: {path} has no column {name!r} among {records.listed(known)}"
            )
        if labelled or roles[role].needed[1]:
            columns[role] = name
    asked = set(columns)
    for role, about in roles.items():
        if role in columns or not (about.needed[1] or labelled):
            continue
        names = [*([usual[role]] if usual and role in usual else []), *about.names]
        left = [by_lower[name.lower()] for name in names if name.lower() in by_lower]
        left = [name for name in left if name not in columns.values()]
        if left:
            columns[role] = left[0]
    missing = [
        role for role, about in roles.items() if role not in columns and about.needed[not labelled]
    ]
    columns |= _by_cells(ahead, missing, [name for name in known if name not in columns.values()])
    for role in missing:
        if role not in columns:
            line_1 = records.kind_of(path) == "csv"
            raise UserError(
                f"{path} has the columns {records.listed(known)}: say by {flag(role)} which one is "
                f"the {role}" + ("; --no-header, if line 1 is a row" if line_1 else "")
            )
    return columns, set(columns) - asked


def _by_cells(ahead: list[dict[str, Any]], missing: list[str], free: list[str]) -> dict[str, str]:
    """The columns of texts and of a label, where there are no others: a label has few values, and
    texts keep their order."""
    if len(free) != len(missing) or not set(missing) <= {"text", "second", "label"}:
        return {}
    if "label" not in missing:
        return dict(zip(missing, free, strict=True))

    def values(column: str) -> tuple[int, int]:
        cells = [str(row.get(column)) for row in ahead]
        return len(set(cells)), sum(map(len, cells))

    label = min(free, key=values)
    if values(label)[0] * 2 > len(ahead):
        return {}
    texts = [name for name in free if name != label]
    return {**dict(zip([r for r in missing if r != "label"], texts, strict=True)), "label": label}
