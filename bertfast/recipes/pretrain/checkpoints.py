"""Checkpoints of a run: whole or absent.

    RUN/checkpoints/step-00000100/   model.pt  optimizer.pt  run.json  manifest.json

One is written into a folder beside the others, each file and the folder flushed to the disk, and
then renamed; manifest.json has the SHA-256 of each file. So whatever moment a process or a machine
dies, what has a checkpoint's name is one. A checkpoint holds whole tensors by their names, however
many processes had them, so another number of processes can go on from it.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from ...commands.errors import UserError
from .. import folders

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".writing"


class Checkpoint(NamedTuple):
    step: int
    run: dict[str, Any]  # what run.json has: place, options, versions, ...
    model: dict[str, Any]
    optimizer: dict[str, Any]


class Hashed(io.RawIOBase):
    """A file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file: IO[bytes] = path.open("wb")
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def close(self) -> None:
        if not self.closed:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
                super().close()


def check_room(folder: Path, needed: int) -> None:
    """Raises UserError where the disk has no room for a checkpoint: before training, not after."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--out: a checkpoint takes {needed / 1e9:.1f} GB, and {str(folder)!r} has room for "
            f"{free / 1e9:.1f} GB"
        )


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Adds a checkpoint to the folder and removes the oldest beyond `keep`."""
    target = folder / f"step-{checkpoint.step:08d}"
    aside = folder / (target.name + _ASIDE)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        contents: dict[str, Callable[[IO[bytes]], object]] = {
            "model.pt": lambda file: torch.save(checkpoint.model, file),
            "optimizer.pt": lambda file: torch.save(checkpoint.optimizer, file),
            "run.json": lambda file: file.write(_json(checkpoint.run)),
        }
        sums = {name: _written(aside / name, put) for name, put in contents.items()}
        _written(aside / MANIFEST, lambda file: file.write(_json(sums)))
        _flush(aside)
        if target.exists():  # of a run that went back to an earlier one
            shutil.rmtree(target)
        aside.rename(target)
        _flush(folder)
    except (OSError, RuntimeError) as error:  # torch's writer may raise its own error
        shutil.rmtree(aside, ignore_errors=True)
        kept = [path.name for _, path in listed(folder)]
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"the checkpoint of step {checkpoint.step} can't be written to {str(folder)!r}: "
            f"{'no space is left on the disk' if full else error}. "
            + (f"{kept[0]} is there to go on from" if kept else "There is none before it")
        ) from error
    for _, path in listed(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    return target


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def _written(path: Path, put: Callable[[IO[bytes]], object]) -> str:
    file: Any = Hashed(path)
    try:
        put(file)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    file.close()
    return file.digest.hexdigest()


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def listed(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of each checkpoint, the latest first."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(m[1]), path) for m, path in found if m is not None), reverse=True)


def latest(folder: Path) -> Checkpoint | None:
    """The latest checkpoint that is as it was written; None where none was ever written. One that
    is damaged is warned of and put aside under another name."""
    there = listed(folder)
    for step, path in there:
        wrong = damage(path)
        if wrong is None:
            run = json.loads((path / "run.json").read_text())
            tensors = [
                torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True)
                for name in ("model", "optimizer")
            ]
            return Checkpoint(step, run, *tensors)
        aside = folder / f"damaged-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        warnings.warn(
            f"checkpoint {str(path)!r} is damaged ({wrong}): it is now called {aside.name!r}, and "
            "the one before it is taken",
            stacklevel=2,
        )
    if there:
        raise UserError(f"no checkpoint in {str(folder)!r} is whole: remove it to begin again")
    return None


def damage(path: Path) -> str | None:
    """How a checkpoint differs from what was written; None if it doesn't."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
        for name, expected in sums.items():
            if _digest(path / name) != expected:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder: no other run may write there. What an earlier one left half written is
    removed."""
    with contextlib.ExitStack() as held:
        try:
            busy = f"--out: another run is at work in {str(folder)!r}"
            held.enter_context(folders.alone(folder / "lock", busy))
        except BlockingIOError as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"--out: {str(folder)!r} can't be written: {error.strerror}") from None
        for path in (folder / "checkpoints").glob(f"*{_ASIDE}"):
            shutil.rmtree(path, ignore_errors=True)
        yield
