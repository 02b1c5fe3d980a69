"""The splits of attention's kernels: a table for each pass and architecture class.

Every line was chosen by compilation, for each class with the machine code of `bertfast kernels` in
hand: no spill in any layout; where several don't spill, the fewest instructions per score, then the
most warps on a multiprocessor. None was measured on a GPU yet. What else the code showed:
  - sm_90's wgmma needs 64 rows and four warps. Tiles of 32 use mma.sync there too.
  - Products of float32 don't use tensor cores, unless torch allows TF32.
  - One kernel for the whole backward fits up to 128 keys. At 256 every split either spills or takes
    60 instructions per score, against 15 in the loops of the two kernels together.
  - Whole rows of 256 keys in the forward spill 32 to 128 bytes on sm_90: from 128 keys on it is
    online.
  - A head dimension of 96 is padded to 128 in registers, not in memory: a third more products and
    registers than it needs.
"""

import functools
from dataclasses import dataclass

from . import limits

# Compute capability of a class: Ampere, Ada, Hopper, and Blackwell's two. Those with wgmma or
# tcgen05 share their lines; the others multiply with mma.sync and share theirs.
ARCHITECTURES = (80, 89, 90, 100, 120)
_WIDE = (90, 100)
PASSES = ("forward", "dq", "dkv", "whole")


@dataclass(frozen=True)
class Config:
    """block_m queries by block_n keys. What a program owns (queries in the forward and in dq, keys
    in dkv and whole) is a plan's tile where there is a plan."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_t: int = 32  # keys in a step at a sequence's end, in the forward and in dq
    chosen_by: str = "compilation"


def architecture(capability: int) -> int:
    """The class of the table that serves a compute capability."""
    return max((a for a in ARCHITECTURES if a <= capability), default=ARCHITECTURES[0])


def block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True)
class _Line:
    """A line serves what all its conditions allow; the first that does is taken."""

    config: Config | None
    length: int | None = None  # up to this many tokens in the longest sequence; None: any number
    width: int = 128  # up to this head dimension
    dropout: bool | None = None  # with it, without it, or either
    tile: int | None = None  # of the plan, 0: none; or any
    arch: int | None = None  # only this class

    def serves(self, arch: int, length: int, width: int, dropout: bool, tile: int) -> bool:
        return (
            self.arch in (None, arch)
            and (self.length is None or length <= self.length)
            and width <= self.width
            and self.dropout in (None, dropout)
            and self.tile in (None, tile)
        )


# Pass and kind ("wide": wgmma or tcgen05; "mma": mma.sync; "fp32": either) -> lines.
_TABLE: dict[tuple[str, str], tuple[_Line, ...]] = {
    ("forward", "wide"): (
        _Line(Config(32, 32, 2, 1), tile=32, width=64, arch=100),
        _Line(Config(32, 32, 2, 2), tile=32, width=64),
        _Line(Config(32, 32, 4, 1), tile=32),
        _Line(Config(64, 64, 4, 1), length=64),
        _Line(Config(64, 128, 4, 1), length=128, tile=0),
        _Line(Config(64, 64, 4, 1), tile=64, dropout=False, arch=100),
        _Line(Config(64, 64, 4, 2)),
    ),
    ("forward", "mma"): (
        _Line(Config(32, 32, 2, 2), tile=32, width=64),
        _Line(Config(32, 32, 4, 1), tile=32),
        _Line(Config(64, 64, 4, 1), length=64),
        _Line(Config(64, 128, 4, 1), length=128, tile=0, dropout=False),
        _Line(Config(128, 128, 8, 1), length=128, tile=0, width=64),
        _Line(Config(64, 64, 4, 2), dropout=False, width=64),
        _Line(Config(64, 64, 4, 1), width=64),
        _Line(Config(64, 64, 4, 1), dropout=False),
        _Line(Config(64, 32, 4, 1)),
    ),
    ("forward", "fp32"): (_Line(Config(32, 32, 4, 1), width=64), _Line(Config(32, 32, 8, 1))),
    ("dq", "wide"): (
        _Line(Config(32, 32, 2, 1), tile=32, width=64),
        _Line(Config(32, 32, 4, 1), tile=32),
        _Line(Config(64, 64, 4, 1), width=64),
        _Line(Config(64, 32, 4, 1)),
    ),
    ("dq", "mma"): (
        _Line(Config(32, 32, 2, 1), tile=32, width=64),
        _Line(Config(32, 32, 4, 1), tile=32),
        _Line(Config(64, 32, 8, 1), width=64, arch=120),
        _Line(Config(64, 64, 4, 1), width=64),
        _Line(Config(64, 32, 8, 1)),
    ),
    ("dq", "fp32"): (_Line(Config(32, 32, 8, 1)),),
    ("dkv", "wide"): (
        _Line(Config(32, 32, 4, 1), tile=32, arch=100),
        _Line(Config(32, 32, 2, 1), tile=32, width=64),
        _Line(Config(32, 32, 4, 1), tile=32),
        _Line(Config(32, 64, 8, 1), tile=64, width=64, dropout=True),
        _Line(Config(32, 64, 4, 1), tile=64, width=64),
        _Line(Config(64, 64, 4, 1), width=64),
        _Line(Config(32, 64, 8, 1)),
    ),
    ("dkv", "mma"): (
        _Line(Config(32, 32, 4, 1), tile=32),
        _Line(Config(32, 64, 4, 1), width=32),
        _Line(Config(32, 32, 4, 1), width=64),
        _Line(Config(32, 64, 8, 1)),
    ),
    ("dkv", "fp32"): (_Line(Config(32, 32, 16, 1), width=64), _Line(Config(16, 32, 8, 1))),
    ("whole", "wide"): (
        _Line(Config(32, 32, 2, 1), length=32, tile=32),
        _Line(None, tile=32),
        _Line(Config(32, 64, 8, 1), length=64, width=64, tile=64),
        _Line(Config(64, 64, 4, 1), length=64, width=64),
        _Line(Config(128, 128, 8, 1), length=128, width=64, tile=0),
        _Line(None),
    ),
    ("whole", "mma"): (
        _Line(Config(32, 32, 2, 1), length=32, tile=32, width=64),
        _Line(None, tile=32),
        _Line(Config(32, 64, 8, 1), length=64, width=64, tile=64),
        _Line(Config(64, 64, 4, 1), length=64, width=64),
        _Line(Config(16, 128, 8, 1), length=128, width=32, tile=0),
        _Line(Config(16, 128, 8, 1), length=128, width=64, tile=0, arch=120),
        _Line(Config(32, 128, 8, 1), length=128, width=64, tile=0),
        _Line(None),
    ),
    ("whole", "fp32"): (_Line(None),),
}


@functools.lru_cache(None)
def config(
    pass_: str, arch: int, itemsize: int, head_dim: int, length: int, dropout: bool, tile: int
) -> Config | None:
    """The configuration of a pass. length is that of the longest sequence, tile the plan's, or 0.
    None for "whole" where one tile can't hold all keys: then dq and dkv run."""
    kind = "fp32" if itemsize == 4 else "wide" if arch in _WIDE else "mma"
    case = (arch, length, block_d(head_dim), dropout, tile)
    for line in _TABLE[pass_, kind]:
        if line.serves(*case):
            return line.config
    raise ValueError(limits.unsupported_reason("triton", None, head_dim, None))
