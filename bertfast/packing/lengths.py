"""Sequence lengths that the host knows: checked, and grouped into runs of equal ones."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def check_bounds(
    bounds: Sequence[int] | np.ndarray, max_seqlen: int, total: int | None, name: str
) -> None:
    """Raises ValueError unless these can be cu_seqlens' values. total: where they must end, and
    `name` what says so."""
    bounds = np.asarray(bounds, dtype=np.int64)
    lengths = np.diff(bounds)
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0, got {bounds[0]}")
    if lengths.size and lengths.min() < 0:
        raise ValueError("cu_seqlens must not decrease")
    if total is not None and total != bounds[-1]:
        raise ValueError(f"cu_seqlens must end at {total}, {name}, got {bounds[-1]}")
    longest = lengths.max() if lengths.size else 0
    if longest > max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least the longest sequence, {longest}, got {max_seqlen}"
        )


class Run(NamedTuple):
    """Neighbouring sequences of one length."""

    sequence: int  # the first of them
    token: int  # its first
    count: int  # type: ignore[assignment]  # how many; hides tuple's method
    length: int


def equal_runs(bounds: Sequence[int] | np.ndarray) -> tuple[Run, ...]:
    """All runs but those of empty sequences."""
    bounds = np.asarray(bounds)
    lengths = np.diff(bounds)
    if not lengths.size:
        return ()
    first = np.flatnonzero(np.diff(lengths, prepend=-1))  # the length differs from the one before
    counts = np.diff(first, append=lengths.size)
    columns = (first, bounds[first], counts, lengths[first])
    runs = zip(*(column.tolist() for column in columns), strict=True)
    return tuple(Run(*run) for run in runs if run[-1])
