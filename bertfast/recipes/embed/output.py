"""A folder of shards: each holds the vectors of so many rows, and is whole or absent.

    _run.json               what the shards are made of, and where each one's rows begin
    shard-00000.parquet     row (int64, from 0 over all files), the id if asked for, embedding
    shard-00000.npy         or: float32 (rows, width), beside
    shard-00000.ids.npy     the ids, or the rows' numbers
    _index.json             the shards, once all are there

Which shards are missing says where to go on. Readers of Parquet folders pass over names with a _.
"""

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

RUN, INDEX, LOCK, FORMAT = "_run.json", "_index.json", ".lock", "bertfast embed"
FORMATS = ("parquet", "npy")
OWN = ("row", "embedding")  # columns
HASHED = (".json", ".safetensors", ".bin", ".txt", ".model")


class Texts(NamedTuple):
    texts: list[str]
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
    rows: int
    places: list[Place]

    @property
    def shards(self) -> int:
        return len(self.places)

    def first(self, shard: int) -> int:
        return shard * self.size

    def count(self, shard: int) -> int:
        return min(self.size, self.rows - self.first(shard))

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.{self.form}"

    def read(self, shard: int) -> Texts:
        place = self.places[shard]
        self.check_unchanged(place.file)
        found = list(
            itertools.islice(rows.read(self.paths, self.columns, place), self.count(shard))
        )
        if found:
            self.check_unchanged(found[-1].end.file)
        if len(found) != self.count(shard):
            raise UserError(f"{self.paths[-1]} has changed since the run began: it has fewer rows")
        ids = None if self.columns.id is None else [row.id for row in found]
        return Texts([row.text for row in found], ids)

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

    def write(self, shard: int, vectors: np.ndarray, ids: list[Any] | None) -> None:
        first = self.first(shard)
        numbers = np.arange(first, first + len(vectors), dtype=np.int64)
        if self.form == "npy":
            beside = self.path(shard).with_suffix(".ids.npy")
            with _aside(beside) as aside, open(aside, "wb") as file:
                np.save(file, numbers if ids is None else np.array(ids), allow_pickle=False)
            with _aside(self.path(shard)) as aside, open(aside, "wb") as file:
                np.save(file, vectors)
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {"row": pa.array(numbers)}
        if ids is not None and self.columns.id is not None:
            columns[self.columns.id] = pa.array(ids)
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
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
        told = {"format": FORMAT, "rows": self.rows, "shards": names}
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
    overwrite: bool,
    bar: Any,
) -> Run:
    """The run of a folder: begun, or to go on with. made_of: all else that decides the vectors.

    Raises UserError where the folder was made of something else, which it names.
    """
    paths = rows.find(source, folder)
    inputs = [told(path) for path in paths]
    options = {**made_of, "column": columns.text, "id": columns.id, "format": form, "shard": size}
    path = folder / RUN
    if overwrite:
        remove(folder)
    for part in folder.glob("shard-*.part"):
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
    else:
        if any(folder.glob("shard-*")):
            raise UserError(
                f"{str(folder)!r} has shards, and no {RUN} that says of what: give --overwrite, "
                "or another folder"
            )
        table = rows.scan(paths, columns, size, bar)
        if [told(path) for path in paths] != inputs:
            raise UserError(f"{str(source)!r} changed while it was read")
        state = {
            "format": FORMAT,
            "options": options,
            "inputs": inputs,
            "rows": table.rows,
            "places": table.places,
        }
        write_json(path, state)
    places = [Place(*place) for place in state["places"]]
    return Run(folder, paths, inputs, columns, form, size, state["rows"], places)


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
        if state["format"] != FORMAT:
            raise KeyError("format")
        return state
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} isn't what an earlier run wrote: {error!r}. Give --overwrite, or "
            "another folder"
        ) from None


def remove(folder: Path) -> None:
    """Removes what an earlier run made, and nothing else."""
    for path in (folder / INDEX, folder / RUN, *folder.glob("shard-[0-9]*")):
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
