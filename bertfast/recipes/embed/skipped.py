"""Bad rows that a run leaves out: all in a file of the output, the first few on the screen."""

import itertools
import json
from pathlib import Path
from typing import IO

from .rows import Row

SKIPPED = "_skipped.jsonl"
SHOWN = 5


class Skipped:
    """Takes bad rows, with their numbers, and writes them down."""

    def __init__(self, file: IO[str], paths: list[Path]) -> None:
        self._file, self._paths = file, paths
        self.numbers: list[int] = []

    def __call__(self, number: int, row: Row) -> None:
        path = str(self._paths[row.end.file])
        place = row.where.removeprefix(f"{path}, ")
        told = {"row": number, "file": path, "place": place, "reason": row.fault}
        self._file.write(json.dumps(told) + "\n")
        self.numbers.append(number)


def lines(folder: Path, count: int) -> list[str]:
    """The few first of `count` bad rows in words, and how many there are."""
    told = [f"bad rows that are left out, and listed in {str(folder / SKIPPED)!r}: {count:,}"]
    with open(folder / SKIPPED) as file:
        for line in itertools.islice(file, SHOWN):
            row = json.loads(line)
            told.append(f"  {row['file']}, {row['place']}: {row['reason']}")
    return told + (["  ..."] if count > SHOWN else [])
