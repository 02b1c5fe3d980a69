"""Padded batches as packed tokens: lengths, tiles for attention, the batch itself.

`plan` makes the tile list of lengths that only the device knows, `lay_out` that of lengths that the
host knows. `batch` takes padding out before the first layer and brings it back after the last.
"""

from .layout import lay_out
from .lengths import Run, check_bounds, equal_runs
from .planning import plan
from .sequences import Sequences, sequences_of
from .tiles import SMALL_TILE, STEP, TILE, Plan, tile_size, useful_share

__all__ = [
    "SMALL_TILE",
    "STEP",
    "TILE",
    "Plan",
    "Run",
    "Sequences",
    "check_bounds",
    "equal_runs",
    "lay_out",
    "plan",
    "sequences_of",
    "tile_size",
    "useful_share",
]
