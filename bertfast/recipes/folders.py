"""A folder that a run writes to and goes on in: its lock, and what changed since it was begun."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(lock: Path, busy: str) -> Iterator[None]:
    """Holds a lock, a file that is made with its folder. It ends with its process, however that
    ends. Raises BlockingIOError, with `busy` and the process that holds it."""
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise BlockingIOError(f"{busy}, process {holder}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def changed_inputs(before: list[list], now: list[list]) -> list[str]:
    """The differences, in words, of two lists of a path and what the file was like."""
    old, new = ({path: rest for path, *rest in listed} for listed in (before, now))
    changed = []
    for path in {**old, **new}:
        if path not in new:
            changed.append(f"{path} was among the inputs")
        elif path not in old:
            changed.append(f"{path} is new among the inputs")
        elif old[path] != new[path]:
            changed.append(f"{path} has changed")
    return changed[:5] + ([f"and {len(changed) - 5} more"] if len(changed) > 5 else [])
