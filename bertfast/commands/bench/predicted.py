"""The time that a provider's own kernels should take on a GPU, modelled from counts.

The floor is the same for all who do a case; this follows what each of them does: how often it reads
and writes activations, which products it makes, how many kernels it starts. Ceilings are those that
the same run measured, and every kernel is taken to reach them. So where a measurement is far above
its model, kernels stay below the ceilings, or the host is too slow to start them; far below, the
counts are wrong, or values were still in a cache.

    product     the longer of its bytes / copy bandwidth and its operations / the rate of products,
                times what is lost by tiles that are cut off, by the last wave of tiles and at the
                start of short sums, relative to the product that the rate was measured with
    attention   the longer of both, at a share of that rate which grows with the length
    the rest    bytes / copy bandwidth
    kernels     the launch gap for each

Counts of traffic are those of CONTRIBUTING's table: ours from launches' own tensors, held by a
test, the others' from their ops. Shares and tiles are assumptions, by what was published for an
H100. Modelled are 16-bit types, and no work of the host.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...ops.linear import run as linear_gelu
from . import floor
from .floor import Ceilings, Work

if TYPE_CHECKING:
    from .models import Model, Tokens

# Of the rate of products that attention reaches with long sequences, and the length at which it has
# half of that: forward and backward.
FLASH = ((0.54, 130), (0.57, 350))
IN_MEMORY = 0.38  # of two products a head, with the scores in memory between them
# Rows and columns of a product's tile, and its speed on a multiprocessor relative to the first.
TILES = (
    *((128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.97), (128, 128, 0.88)),
    *((64, 256, 0.85), (64, 128, 0.72), (64, 64, 0.5)),
)
SPLITS = (1, 2, 3, 4, 6, 8)  # of a product's sum, where there are fewer tiles than multiprocessors
START = 80  # terms of a sum that take as long as a tile's beginning and end


@dataclass(frozen=True)
class Gpu:
    """The knowledge about a GPU: measured in the same run, but for its multiprocessors."""

    ceilings: Ceilings
    gap_us: float
    multiprocessors: int
    measured: tuple[tuple[int, int, int], ...]  # the products that the best rate is of

    def product_us(self, rows: int, columns: int, inner: int) -> float:
        """Without its bytes."""
        best = max(_yield(*sizes, self.multiprocessors) for sizes in self.measured)
        reached = _yield(rows, columns, inner, self.multiprocessors) / best
        return 2e6 * rows * columns * inner / (self.ceilings.flop_per_s * reached)

    def memory_us(self, bytes_: float) -> float:
        return 1e6 * bytes_ / self.ceilings.bytes_per_s


def _yield(rows: int, columns: int, inner: int, multiprocessors: int) -> float:
    """The part of the multiprocessors' time that is spent on terms that count."""
    least = math.inf
    for tile_rows, tile_columns, speed in TILES:
        tiles = math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
        for split in SPLITS:
            if split == 1 or (tiles * split <= multiprocessors and inner >= 128 * split):
                waves = math.ceil(tiles * split / multiprocessors)
                tile = tile_rows * tile_columns * (inner / split + START) / speed
                least = min(least, waves * tile)
    return rows * columns * inner / (multiprocessors * least)


class Product(NamedTuple):
    rows: int
    columns: int
    inner: int
    extra: float = 0  # values that its epilogue reads or writes besides the product


@dataclass(frozen=True)
class Counts:
    """All that a provider does for a case."""

    kernels: int
    bytes: float  # through memory, but for those of products and attention
    itemsize: int = 2
    products: tuple[Product, ...] = ()
    attention: tuple[tuple[Work, float], ...] = ()  # with the share of the products' rate

    def us(self, gpu: Gpu) -> float:
        total = gpu.memory_us(self.bytes) + self.kernels * gpu.gap_us
        for rows, columns, inner, extra in self.products:
            values = rows * inner + inner * columns + rows * columns + extra
            moved = gpu.memory_us(values * self.itemsize)
            total += max(moved, gpu.product_us(rows, columns, inner))
        for work, share in self.attention:
            at_share = Ceilings(gpu.ceilings.bytes_per_s, gpu.ceilings.flop_per_s * share)
            total += work.floor_us(at_share)
        return total

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.kernels + other.kernels,
            self.bytes + other.bytes,
            self.itemsize,
            self.products + other.products,
            self.attention + other.attention,
        )

    def times(self, count: int) -> "Counts":
        return Counts(
            count * self.kernels,
            count * self.bytes,
            self.itemsize,
            count * self.products,
            count * self.attention,
        )


@dataclass(frozen=True)
class Layer:
    """A layer by a provider, each in inference, in training's forward and in the backward.

    Units are tokens x width values, where the inner width is four times the width.
    """

    units: tuple[float, float, float]  # of activations, read or written beside products, attention
    kernels: tuple[int, int, int]
    joined: bool = True  # q, k and v are one product
    packed: bool = False  # without padding, in a model
    scores: tuple[float, float, float] | None = None  # times that all scores are read or written
    in_product: tuple[float, float, float] = (0, 0, 0)  # units of the product that GELU is part of


EAGER = Layer((26, 26, 56), (20, 20, 55), joined=False, scores=(8, 8, 11.5))
SDPA = Layer((18, 18, 42), (12, 12, 38), joined=False)
COMPILED = Layer((14, 14, 30), (9, 9, 24), joined=False)
FLASH_PACKED = Layer((14, 14, 34), (8, 8, 22), joined=False, packed=True)
OURS = Layer((14, 16, 25), (8, 9, 18), packed=True)
OURS_ONE = Layer((6, 8, 13), (7, 8, 17), packed=True, in_product=(0, 4, 4))
LAYERS = {
    "bertfast": OURS,
    "bertfast padded": OURS,
    "bertfast graphs": OURS,
    "bertfast graph": OURS,
    "HF eager": EAGER,
    "HF SDPA": SDPA,
    "HF SDPA graph": SDPA,
    "torch compile": COMPILED,
    "torch compile max": COMPILED,
    "flash-attn varlen": FLASH_PACKED,
}


def _ours(forward_in_one: bool, backward_in_one: bool) -> Layer:
    """GELU in one kernel with its product, or not, forward and backward."""
    first, last = OURS_ONE if forward_in_one else OURS, OURS_ONE if backward_in_one else OURS
    return dataclasses.replace(
        OURS,
        units=(*first.units[:2], last.units[2]),
        kernels=(*first.kernels[:2], last.kernels[2]),
        in_product=(*first.in_product[:2], last.in_product[2]),
    )


def encoder(
    sizes: "Model",
    tokens: "Tokens",
    dtype: torch.dtype,
    training: bool,
    alone: bool,
    provider: str,
) -> Counts | None:
    """A layer alone or a model; None where the provider's counts aren't known."""
    layer = LAYERS.get(provider)
    counted = sizes.inner == 4 * sizes.width and sizes.gated is None
    if layer is None or not counted or dtype.itemsize != 2:
        return None
    packed = layer.packed and provider not in ("bertfast padded", "bertfast graph")
    lengths = tokens.lengths if packed else (tokens.longest,) * len(tokens.lengths)
    if layer is OURS:
        device, product = torch.device("cuda"), (sizes.width, sizes.inner)
        call = (*product, sum(lengths))
        choice = linear_gelu.choose("auto", device, dtype, call, product)
        layer = _ours(choice.forward is not None, choice.backward is not None)
    found = _pass(layer, sizes, lengths, int(training))
    if training:
        found += _pass(layer, sizes, lengths, 2)
    if not alone:
        values = (5 if training else 2) * sum(lengths) * sizes.width
        found = found.times(sizes.layers) + Counts(3 if training else 1, 2 * values)
    return found


def flash_share(tokens: int, pairs: int, backward: bool) -> float:
    """Of the rate of products, what attention reaches that keeps its scores. pairs: of tokens that
    see each other."""
    most, half = FLASH[backward]
    return most / (1 + half * tokens / max(1, pairs))


def _pass(layer: Layer, sizes: "Model", lengths: Sequence[int], number: int) -> Counts:
    """number: of the pass, as in Layer."""
    tokens, width, inner = sum(lengths), sizes.width, sizes.inner
    unit, backward = tokens * width, number == 2
    weights = [(3 * width, width)] if layer.joined else 3 * [(width, width)]
    weights += [(width, width), (inner, width), (width, inner)]  # (outputs, inputs)
    products = [Product(tokens, *weight) for weight in weights]
    gelu = len(products) - 2
    if backward:  # the gradient of each input, then of each weight; GELU's follows `down`'s
        products = [Product(tokens, inputs, outputs) for outputs, inputs in weights]
        products += [Product(outputs, inputs, tokens) for outputs, inputs in weights]
        gelu += 1
    products[gelu] = products[gelu]._replace(extra=layer.in_product[number] * unit)
    moved = 2.0 * layer.units[number] * unit
    work = floor.attention(lengths, width, 2, backward)
    pairs = sum(length * length for length in lengths)
    if layer.scores is not None:
        moved += 2 * layer.scores[number] * sizes.heads * pairs
        work = Work("attention", (8 if backward else 4) * width * pairs, work.bytes)
        share = IN_MEMORY
    else:
        share = flash_share(tokens, pairs, backward)
    return Counts(layer.kernels[number], moved, 2, tuple(products), ((work, share),))
