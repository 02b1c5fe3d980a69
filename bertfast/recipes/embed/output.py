"""A folder of shards: each holds the vectors or scores of so many rows, and is whole or absent.

    _run.json               what the shards are made of, and where each one's rows begin
    _skipped.jsonl          the bad rows that were left out
    shard-00000.parquet     row (int64, from 0 over all files, bad ones too), the id if asked for,
                            embedding or score
    shard-00000.npy         or: float32 (rows, width), or (rows,) of single scores, beside
    shard-00000.ids.npy     the ids, or the rows' numbers
    _index.json             the shards, once all are there

Which shards are missing says where to go on. Readers of Parquet folders pass over names with a _.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...commands.errors import UserError
from .. import folders
from ..pretrain.shards import write_json
from . import rows
from .rows import Columns, Place
from .skipped import SKIPPED, Skipped

RUN, INDEX, LOCK, FORMAT = "_run.json", "_index.json", ".lock", "bertfast embed"
FORMATS = ("parquet", "npy")
VECTOR, SCORE = "embedding", "score"
OWN = ("row", VECTOR, SCORE)  # columns
HASHED = (".json", ".safetensors", ".bin", ".txt", ".model")


class Keys(NamedTuple):
    """The columns of a shard that aren't computed."""

    numbers: list[int]
    ids: list[Any] | None


@dataclass(frozen=True)
class Run:
    """The work of a folder. It can be pickled."""

    folder: Path
    paths: list[Path]
    inputs: list[list[Any]]
    columns: Columns
    form: str
    size: int
    total: int  # rows of the input
    places: list[Place]
    skipped: list[int]  # the numbers of bad rows, which are left out
    id_kind: str | None

    @property
    def rows(self) -> int:
        """Of the output."""
        return self.total - len(self.skipped)

    @property
    def shards(self) -> int:
        return len(self.places)

    def numbers(self, shard: int) -> range:
        """Those of its rows, bad ones too."""
        return range(shard * self.size, min((shard + 1) * self.size, self.total))

    def count(self, shard: int) -> int:
        """Of its rows in the output."""
        return len(self.numbers(shard)) - len(self.skipped_in(shard))

    def skipped_in(self, shard: int) -> list[int]:
        of = self.numbers(shard)
        first, end = (bisect.bisect_left(self.skipped, number) for number in (of.start, of.stop))
        return self.skipped[first:end]

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.{self.form}"

    def read(self, shard: int) -> tuple[list[Any], Keys]:
        """Its texts or pairs, and what goes along."""
        place, numbers, bad = self.places[shard], self.numbers(shard), set(self.skipped_in(shard))
        self.check_unchanged(place.file)
        found = list(itertools.islice(rows.read(self.paths, self.columns, place), len(numbers)))
        if found:
            self.check_unchanged(found[-1].end.file)
        if len(found) != len(numbers):
            raise UserError(f"{self.paths[-1]} has changed since the run began: it has fewer rows")
        good = {n: row for n, row in zip(numbers, found, strict=True) if n not in bad}
        for row in good.values():
            if row.fault:
                raise UserError(f"{row.where}: {row.fault}, which has changed since the run began")
        ids = None if self.columns.id is None else [row.id for row in good.values()]
        return [row.item for row in good.values()], Keys(list(good), ids)

    def check_unchanged(self, file: int) -> None:
        if told(self.paths[file]) != self.inputs[file]:
            raise UserError(f"{self.paths[file]} has changed since the run began")

    def missing(self) -> list[int]:
        return [shard for shard in range(self.shards) if not self.has(shard)]

    def has(self, shard: int) -> bool:
        """True for a whole shard. A damaged one is made again."""
        path = self.path(shard)
        if not path.exists():
            return False
        try:
            if self.form == "npy":
                return len(np.load(path, mmap_mode="r")) == self.count(shard)
            import pyarrow.parquet as pq

            return pq.read_metadata(path).num_rows == self.count(shard)
        except Exception:  # a broken file may end in any of pyarrow's and numpy's own
            return False

    def write(self, shard: int, made: np.ndarray, keys: Keys) -> None:
        """made: float32 (rows, width)."""
        numbers = np.array(keys.numbers, np.int64)
        ids = None
        if keys.ids is not None:
            ids = np.array(keys.ids, np.int64 if self.id_kind == "int" else str)
        single = self.columns.pair is not None and made.shape[1] == 1
        values = np.ascontiguousarray(made).reshape(-1)
        if self.form == "npy":
            beside = self.path(shard).with_suffix(".ids.npy")
            with _aside(beside) as aside, open(aside, "wb") as file:
                np.save(file, numbers if ids is None else ids, allow_pickle=False)
            with _aside(self.path(shard)) as aside, open(aside, "wb") as file:
                np.save(file, values if single else made)
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {"row": pa.array(numbers)}
        if keys.ids is not None and self.columns.id is not None:
            kind = pa.int64() if self.id_kind == "int" else pa.string()
            columns[self.columns.id] = pa.array(keys.ids, kind)
        flat = pa.array(values)
        name = VECTOR if self.columns.pair is None else SCORE
        columns[name] = flat if single else pa.FixedSizeListArray.from_arrays(flat, made.shape[1])
        with _aside(self.path(shard)) as aside:
            # Vectors don't compress, and dictionaries of their numbers are larger than they.
            pq.write_table(
                *(pa.table(columns), aside),
                compression="none",
                use_dictionary=False,
                write_statistics=["row"],
            )

    def finish(self) -> None:
        names = [self.path(shard).name for shard in range(self.shards)]
        counts = {"rows": self.rows, "skipped": len(self.skipped)}
        told = {"format": FORMAT, **counts, "shards": names}
        write_json(self.folder / INDEX, told)


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes the file's when all is on disk."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield aside
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def told(path: Path) -> list[Any]:
    about = path.stat()
    return [str(path.resolve()), about.st_size, about.st_mtime_ns]


def of_model(folder: Path) -> str:
    """The checksum of a model's files."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in HASHED:
            found.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                while data := file.read(2**24):
                    found.update(data)
    return found.hexdigest()


def begin(
    folder: Path,
    source: Path,
    columns: Columns,
    *,
    form: str,
    size: int,
    made_of: dict[str, Any],
    skip_bad: bool,
    overwrite: bool,
    bar: Any,
) -> Run:
    """The run of a folder: begun, or to go on with. made_of: all else that decides the numbers.

    Raises UserError where the folder was made of something else, which it names.
    """
    paths = rows.find(source, folder)
    inputs = [told(path) for path in paths]
    named = {"column": columns.text, "pair": columns.pair, "id": columns.id}
    options = {**made_of, **named, "format": form, "shard": size}
    path = folder / RUN
    if overwrite:
        remove(folder)
    for part in (*folder.glob("shard-*.part"), *folder.glob(f"{SKIPPED}.*.part")):
        part.unlink()
    if path.exists():
        state = _state(path)
        changed = _changed_options(state["options"], options)
        changed += folders.changed_inputs(state["inputs"], inputs)
        if changed:
            raise UserError(
                f"{str(folder)!r} was begun with something else: {'; '.join(changed)}. Give "
                "--overwrite, or another folder"
            )
        if state["skipped"] and not skip_bad:
            raise UserError(
                f"{str(folder)!r} was begun without {len(state['skipped']):,} bad rows: give "
                "--skip-bad, or --overwrite"
            )
    else:
        if any(folder.glob("shard-*")):
            raise UserError(
                f"{str(folder)!r} has shards, and no {RUN} that says of what: give --overwrite, "
                "or another folder"
            )
        (folder / SKIPPED).unlink(missing_ok=True)
        table, skipped = _scan(paths, columns, size, folder if skip_bad else None, bar)
        if [told(path) for path in paths] != inputs:
            raise UserError(f"{str(source)!r} changed while it was read")
        state = {
            "format": FORMAT,
            "options": options,
            "inputs": inputs,
            "rows": table.rows,
            "places": table.places,
            "skipped": skipped,
            "id_kind": table.ids,
        }
        write_json(path, state)
    places = [Place(*place) for place in state["places"]]
    counts = (state["rows"], places, state["skipped"], state["id_kind"])
    return Run(folder, paths, inputs, columns, form, size, *counts)


def _scan(
    paths: list[Path], columns: Columns, size: int, folder: Path | None, bar: Any
) -> tuple[rows.Table, list[int]]:
    """All rows, and the numbers of bad ones, which are listed in the folder; None: there may be
    none."""
    if folder is None:
        return rows.scan(paths, columns, size, bar), []
    with _aside(folder / SKIPPED) as aside, open(aside, "w") as file:
        skip = Skipped(file, paths)
        return rows.scan(paths, columns, size, bar, skip), skip.numbers


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
        if state["format"] != FORMAT:
            raise KeyError("format")
        state["skipped"], state["id_kind"]
        return state
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} isn't what an earlier run wrote: {error!r}. Give --overwrite, or "
            "another folder"
        ) from None


def remove(folder: Path) -> None:
    """Removes what an earlier run made, and nothing else."""
    for path in (*(folder / n for n in (INDEX, RUN, SKIPPED)), *folder.glob("shard-[0-9]*")):
        path.unlink(missing_ok=True)


def _changed_options(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"--{name.replace('_', '-')} was {before.get(name)}, and is {value} now"
        if not name.endswith("_checksum")
        else f"the files of --{name.removesuffix('_checksum')} have changed"
        for name, value in now.items()
        if before.get(name) != value
    ]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time writes in a folder."""
    with contextlib.ExitStack() as held:
        try:
            busy = f"another run is writing to {str(folder)!r}"
            held.enter_context(folders.alone(folder / LOCK, busy))
        except BlockingIOError as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"{str(folder)!r} can't be written: {error.strerror}") from None
        yield
