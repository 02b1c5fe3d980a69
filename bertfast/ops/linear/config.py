"""The tiles of Triton's kernels that make a product and its activation: a table by architecture and
pass.

Every line was chosen by compilation: no spill, and of instructions outside the main loop for each
sum at most 20 in the forward, 30 in the backward; of a gated activation 17 and 50. None was
measured on a GPU yet. The first of a pass serves it; `bertfast tune` tries the others too. What
else the code showed:
  - On sm_90 the products of one tile and the epilogue of another overlap only where two blocks are
    on a multiprocessor: a loop over tiles waits for the products before their epilogue. So tiles
    of 128 x 128 come first, though they read a third more of the second-level cache than those of
    128 x 256.
  - An epilogue that takes a tile by parts of its columns needs fewer registers at once: the
    backward spills with one part.
  - A gated activation's backward has two values beside each sum: with two parts of 128 columns it
    spills on sm_90, with four it has 255 registers.
  - On sm_100 a thread has a row of the sums, as they lie in tensor memory. Sums over rows take ten
    instructions for each element there, by shuffles; where u and dv are accessed by addresses the
    tile is laid out anew in any case, and they take one or two.
  - Triton 3.6 can't divide the warps' work ("specialized"), which 3.7 can on sm_100.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .. import tuned
from . import limits

# Compute capability of a class: Ampere with Ada, Hopper, and Blackwell's two.
ARCHITECTURES = (80, 90, 100, 120)
# y alone; y and u, for a backward; the backward.
PASSES = ("forward", "saving", "backward")
# The same of a gated activation, where a tile's columns are those of each half.
GATED = ("gated forward", "gated saving", "gated backward")

# "pointers": a tile for each program, by addresses. The others by tensor descriptors: a tile for
# each program; the same with descriptors of the operands alone; programs that walk over the tiles;
# those with the warps' work divided by the compiler.
FORMS = ("pointers", "descriptors", "operands", "persistent", "specialized")


@dataclass(frozen=True)
class Config:
    form: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int  # of the columns, which the epilogue takes one after the other
    chosen_by: str = "machine code"

    @property
    def numbers(self) -> list[int]:
        """In a file of measurements."""
        block = (self.block_m, self.block_n, self.block_k)
        return [1 + FORMS.index(self.form), *block, self.num_warps, self.num_stages, self.parts]

    @staticmethod
    def of(numbers: Sequence[int], chosen_by: str = "machine code") -> "Config":
        form, block_m, block_n, block_k, num_warps, num_stages, parts = numbers
        block = (block_m, block_n, block_k)
        return Config(FORMS[form - 1], *block, num_warps, num_stages, parts, chosen_by)

    def __str__(self) -> str:
        block = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{self.form} {block}, {self.num_warps} warps, {self.num_stages} stages"


def _pointers(parts: int) -> Config:
    return Config("pointers", 128, 128, 32, 4, 4, parts)


def _by_tiles(form: str, parts: int) -> Config:
    return Config(form, 128, 128, 64, 4, 3, parts)


def _walking(block_m: int, block_n: int, parts: int = 2) -> Config:
    return Config("persistent", block_m, block_n, 64, 8, 3, parts)


def _small(parts: int) -> Config:
    """For little shared memory."""
    return Config("descriptors", 128, 128, 32, 4, 3, parts)


def _gated(form: str, block_k: int, parts: int) -> Config:
    """128 x 128 sums: 64 columns of each half."""
    return Config(form, 128, 64, block_k, 4, 4 if form == "pointers" else 3, parts)


_TABLE: dict[tuple[int, str], tuple[Config, ...]] = {
    (80, "forward"): (_pointers(1),),
    (80, "saving"): (_pointers(2),),
    (80, "backward"): (_pointers(2),),
    (90, "forward"): (_by_tiles("descriptors", 2), _walking(128, 256)),
    (90, "saving"): (_by_tiles("descriptors", 2), _walking(128, 256)),
    (90, "backward"): (_by_tiles("descriptors", 2), _walking(256, 128)),
    (100, "forward"): (
        _by_tiles("descriptors", 2),
        Config("specialized", 128, 256, 64, 8, 3, 1),
    ),
    (100, "saving"): (_by_tiles("descriptors", 2),),
    (100, "backward"): (_by_tiles("operands", 2),),
    (120, "forward"): (_small(4),),
    (120, "saving"): (_small(4),),
    (120, "backward"): (_small(4),),
    (80, "gated forward"): (_gated("pointers", 32, 1),),
    (80, "gated saving"): (_gated("pointers", 32, 1),),
    (80, "gated backward"): (_pointers(4),),
    (90, "gated forward"): (_gated("descriptors", 64, 1), _walking(128, 128)),
    (90, "gated saving"): (_gated("descriptors", 64, 1), _walking(128, 128)),
    (90, "gated backward"): (_by_tiles("descriptors", 4), _walking(256, 128, 4)),
    (100, "gated forward"): (_gated("descriptors", 64, 1),),
    (100, "gated saving"): (_gated("descriptors", 64, 1),),
    (100, "gated backward"): (_by_tiles("operands", 4),),
    (120, "gated forward"): (_gated("descriptors", 32, 2),),
    (120, "gated saving"): (_gated("descriptors", 32, 2),),
    (120, "gated backward"): (_small(4),),
}


def architecture(capability: int) -> int:
    """The class of the table that serves a compute capability."""
    return max((a for a in ARCHITECTURES if a <= capability), default=ARCHITECTURES[0])


def candidates(arch: int, pass_: str, itemsize: int = 2) -> list[Config]:
    """The configurations that may serve a pass: the one that serves it first."""
    assert itemsize == 2, "16-bit types only"
    return list(_TABLE[arch, pass_])


def key(pass_: str, inputs: int, outputs: int, rows: int) -> str:
    """The name of a case in a file of measurements. inputs, outputs: of the pass's own product."""
    sizes = (inputs, outputs, limits.rows_class(rows))
    op, name = "linear_gelu", pass_
    if pass_ in GATED:
        op, name = "linear_gated", pass_.removeprefix("gated ")
    return tuned.key(op, *sizes, None if name == "forward" else name)


@functools.lru_cache(None)
def choose(
    pass_: str,
    arch: int,
    inputs: int,
    outputs: int,
    most_rows: int,
    device: torch.device | None = None,
) -> Config:
    """The configuration of a pass. most_rows: of limits.ROWS the one that serves the call. device:
    a GPU, whose measurements come first."""
    if pass_ in _trial:
        return _trial[pass_]
    first, *_ = known = candidates(arch, pass_)
    case = key(pass_, inputs, outputs, most_rows)
    choice = tuned.current(device).splits.get(case) if device else None
    if choice is not None and len(choice.chosen) == len(first.numbers):
        for one in known:  # others may not compile, or spill
            if one.numbers == list(choice.chosen):
                return Config.of(choice.chosen, "measurement")
    return first


tuned.depending.append(choose.cache_clear)

# A pass -> what it is tried with.
_trial: dict[str, Config] = {}


@contextlib.contextmanager
def trial(pass_: str, chosen: Config) -> Iterator[None]:
    """Within it a pass has this configuration."""
    before = dict(_trial)
    _trial[pass_] = chosen
    choose.cache_clear()
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)
        choose.cache_clear()
