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
  - Where a product feeds another and a block has more warps than its rows have sixteens, mma.sync
    does it twice: 64 queries need four warps. dq at a head dimension of 128 has eight all the same,
    as with four it spills.
  - With two stages a turn's loads are copied during the turn before. In a backward this helps where
    dq is multiplied by mma.sync: every load is asynchronous instead of none, with fewer
    instructions and at most 246 registers instead of 255; with a plan it spills. On sm_90 the
    compiler says C7515 of dkv with two stages: it waits after every wgmma, 16 times for 4 products.
    There dq would have a block less on a multiprocessor.
  - A head dimension of 96 is padded to 128 in registers, not in memory: a third more products and
    registers than it needs.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import tuned
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

    @property
    def numbers(self) -> list[int]:
        return [self.block_m, self.block_n, self.num_warps, self.num_stages, self.block_t]

    @staticmethod
    def of(numbers: Sequence[int], chosen_by: str = "compilation") -> "Config | None":
        if not numbers:
            return None
        block_m, block_n, num_warps, num_stages, block_t = numbers
        return Config(block_m, block_n, num_warps, num_stages, block_t, chosen_by)


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
    masked: bool | None = None  # with a key_mask, without it, or either

    def serves(
        self, arch: int, length: int, width: int, dropout: bool, tile: int, masked: bool
    ) -> bool:
        return (
            self.arch in (None, arch)
            and (self.length is None or length <= self.length)
            and width <= self.width
            and self.dropout in (None, dropout)
            and self.tile in (None, tile)
            and self.masked in (None, masked)
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
        _Line(Config(64, 64, 4, 2), masked=True, width=64),
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
        _Line(Config(64, 64, 4, 2), width=64, tile=0),
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
        _Line(Config(64, 64, 4, 1), width=32, tile=0),
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
        _Line(Config(128, 128, 8, 1), length=128, width=32, tile=0),
        _Line(Config(16, 128, 8, 1), length=128, width=64, tile=0, arch=120),
        _Line(Config(32, 128, 8, 1), length=128, width=64, tile=0),
        _Line(None),
    ),
    ("whole", "fp32"): (_Line(None),),
}


def bias_split(arch: int, itemsize: int, head_dim: int) -> tuple[int, int]:
    """Queries, which are as many as keys, and warps of the kernel of a bias's gradient. mma.sync
    would do products of 32 rows twice with more than two warps."""
    if itemsize == 2 and head_dim <= 64:
        return (64, 8) if arch in _WIDE else (32, 2)
    return 32, 4


class Split(NamedTuple):
    """A case of the table. length is that of the longest sequence, tile the plan's, or 0."""

    pass_: str
    arch: int
    itemsize: int
    head_dim: int
    length: int
    dropout: bool
    tile: int
    masked: bool = False  # with a key_mask

    @property
    def lines(self) -> tuple[_Line, ...]:
        kind = "fp32" if self.itemsize == 4 else "wide" if self.arch in _WIDE else "mma"
        return _TABLE[self.pass_, kind]

    @property
    def key(self) -> str:
        """Its name in a file of measurements."""
        words = (f"{8 * self.itemsize}-bit", f"D{self.head_dim}")
        longest = limits.length_class(self.length)
        dropout, tile = (
            "dropout" if self.dropout else None,
            f"tile{self.tile}" if self.tile else None,
        )
        how = (dropout, tile, "masked" if self.masked else None)
        return tuned.key(self.pass_, *words, f"length{longest}", *how)

    def fits(self, chosen: Config | None) -> bool:
        """True if a split can serve the case."""
        if chosen is None:
            return self.pass_ == "whole"
        block = chosen.block_m if self.pass_ in ("forward", "dq") else chosen.block_n
        if self.tile % block:
            return False
        return self.pass_ != "whole" or chosen.block_n >= self.length


@functools.lru_cache(None)
def config(
    pass_: str,
    arch: int,
    itemsize: int,
    head_dim: int,
    length: int,
    dropout: bool,
    tile: int,
    masked: bool = False,
    device: torch.device | None = None,
) -> Config | None:
    """The configuration of a pass. masked: with a key_mask. device: a GPU, whose measurements come
    first. None for "whole" where one tile can't hold all keys: then dq and dkv run."""
    split = Split(pass_, arch, itemsize, head_dim, length, dropout, tile, masked)
    if pass_ in _trial and split.fits(_trial[pass_]):
        return _trial[pass_]
    choice = tuned.current(device).splits.get(split.key) if device else None
    if choice is not None:
        chosen = Config.of(choice.chosen, "measurement")
        if split.fits(chosen):
            return chosen
    case = (arch, length, block_d(head_dim), dropout, tile, masked)
    for line in split.lines:
        if line.serves(*case):
            return line.config
    raise ValueError(limits.unsupported_reason("triton", None, head_dim, None))


tuned.depending.append(config.cache_clear)


def candidates(split: Split) -> list[Config | None]:
    """The splits that may serve a case: the table's own first, then all others of its kind."""
    own = config(*split)
    return list(
        dict.fromkeys([own, *(line.config for line in split.lines if split.fits(line.config))])
    )


# A pass -> what it is tried with.
_trial: dict[str, Config | None] = {}


@contextlib.contextmanager
def trial(pass_: str, chosen: Config | None) -> Iterator[None]:
    """Within it a pass has this split wherever it fits."""
    before = dict(_trial)
    _trial[pass_] = chosen
    config.cache_clear()
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)
        config.cache_clear()
