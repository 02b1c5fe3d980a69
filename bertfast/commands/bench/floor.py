"""The least time that an encoder needs on a machine whose ceilings were measured.

A layer is taken to be seven kernels, each as well fused as it could be; a kernel takes at least the
longer of (operations / rate of matrix products) and (bytes / copy bandwidth), and no time passes
between kernels. Only real tokens count: padding is waste. So the floor is the same
for every implementation, and one that computes padding is far above it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .models import Model


@dataclass(frozen=True)
class Ceilings:
    """Rates that the machine reached in the same run."""

    bytes_per_s: float  # of a large copy, read plus written
    flop_per_s: float  # of matrix products at BERT's own sizes, in the case's dtype


@dataclass(frozen=True)
class Work:
    """The work of one kernel."""

    kind: str  # products, attention or memory
    flops: int
    bytes: int

    def floor_us(self, ceilings: Ceilings) -> float:
        return 1e6 * max(self.flops / ceilings.flop_per_s, self.bytes / ceilings.bytes_per_s)


def floor_us(work: Iterable[Work], ceilings: Ceilings) -> float:
    return sum(kernel.floor_us(ceilings) for kernel in work)


def _product(rows: int, inner: int, columns: int, itemsize: int, more: int = 0) -> Work:
    """rows x inner times inner x columns. more: values that its epilogue reads or writes too."""
    values = rows * inner + inner * columns + rows * columns + more
    return Work("products", 2 * rows * inner * columns, values * itemsize)


def pairs_of(lengths: Sequence[int], window: tuple[int, int] | None = None) -> int:
    """A query and a key of one sequence each, the key in the query's window."""
    if window is None:
        return sum(length * length for length in lengths)
    found = sum(lengths)
    for length in lengths:
        for side in window:
            near = min(side, length - 1)  # so many queries have fewer keys to this side
            found += near * (near + 1) // 2 + (length - 1 - near) * near if length else 0
    return found


def attention(
    lengths: Sequence[int],
    width: int,
    itemsize: int,
    backward: bool = False,
    window: tuple[int, int] | None = None,
) -> Work:
    """All heads of one layer; lse, a value per row and head, is left out. With a window only the
    pairs that see each other count.

    forward    scores and their product with v: 4 * width operations per pair of tokens; q, k, v
               read, the context written
    backward   five products of two where the forward has two; q, k, v, out and its gradient read,
               three gradients written
    """
    operations, values = (10, 8) if backward else (4, 4)
    pairs = pairs_of(lengths, window)
    return Work("attention", operations * width * pairs, values * sum(lengths) * width * itemsize)


def forward(
    sizes: Model, lengths: Sequence[int], itemsize: int, training: bool = False
) -> list[Work]:
    """One layer. Products add bias and residual and apply GELU as they write.

    memory      two LayerNorms, each reads the sum and writes: 2 values per element
    training    what GELU was applied to is written too
    """
    tokens, width, inner = sum(lengths), sizes.width, sizes.inner
    values = tokens * width
    return [
        _product(tokens, width, 3 * width, itemsize),
        attention(lengths, width, itemsize),
        _product(tokens, width, width, itemsize, more=values),
        Work("memory", 0, 2 * values * itemsize),
        _product(tokens, width, inner, itemsize, more=tokens * inner if training else 0),
        _product(tokens, inner, width, itemsize, more=values),
        Work("memory", 0, 2 * values * itemsize),
    ]


def backward(sizes: Model, lengths: Sequence[int], itemsize: int) -> list[Work]:
    """One layer's gradients: each product twice, for its input and for its weight.

    memory      LayerNorm reads dy and what it normalised, writes the gradient: 3 values per element
    GELU's derivative and the residuals' sums are epilogues.
    """
    tokens, width, inner = sum(lengths), sizes.width, sizes.inner
    values = tokens * width
    return [
        Work("memory", 0, 3 * values * itemsize),
        _product(tokens, width, inner, itemsize, more=tokens * inner),
        _product(inner, tokens, width, itemsize),
        _product(tokens, inner, width, itemsize, more=values),
        _product(width, tokens, inner, itemsize),
        Work("memory", 0, 3 * values * itemsize),
        _product(tokens, width, width, itemsize),
        _product(width, tokens, width, itemsize),
        attention(lengths, width, itemsize, backward=True),
        _product(tokens, 3 * width, width, itemsize, more=values),
        _product(width, tokens, 3 * width, itemsize),
    ]


def layer(sizes: Model, lengths: Sequence[int], itemsize: int, training: bool) -> list[Work]:
    """Forward, and backward too if training."""
    kernels = forward(sizes, lengths, itemsize, training)
    return kernels + backward(sizes, lengths, itemsize) if training else kernels


def model(sizes: Model, lengths: Sequence[int], itemsize: int, training: bool) -> list[Work]:
    """All layers and the embeddings, whose rows are read and whose normalised sum is written.

    What a head or pooler adds is left out: it sees one token per sequence.
    """
    values = sum(lengths) * sizes.width
    embeddings = Work("memory", 0, (5 if training else 2) * values * itemsize)
    return [embeddings] + sizes.layers * layer(sizes, lengths, itemsize, training)
