"""A score as it is made of a query and a key, in the form that attention takes.

    score = scale * rotated(q) rotated(k)^T + bias,  -inf for keys outside the window

rotated: half-split rotary positions. With a head's first half x1 and its second x2, and the tables'
row of the token's position,
    x1 cos - x2 sin,  x2 cos + x1 sin
in float32, rounded once to the operands' dtype.
bias: for each head and distance key - query, distances beyond `reach` counting as reach.
Positions are counted from a sequence's first token, or in a padded batch from the row's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ... import tracing

NO_LIMIT = 2**30  # keys to a side of a query: more than any sequence has


class Scores(NamedTuple):
    """All that makes a score but q and k themselves."""

    scale: float
    cos: torch.Tensor | None = None  # float32 (positions, head_dim // 2)
    sin: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # (heads, 2 * reach + 1)
    left: int = NO_LIMIT  # a query sees keys from left before it to right behind it
    right: int = NO_LIMIT

    @property
    def windowed(self) -> bool:
        return self.left < NO_LIMIT or self.right < NO_LIMIT

    @property
    def all_seen(self) -> bool:
        """True if each query sees all keys, and nothing is added to their scores."""
        return self.bias is None and not self.windowed

    @property
    def features(self) -> tuple[str, ...]:
        """The arguments of the public function that were given, beside scale."""
        given = {
            "rotary": self.cos is not None,
            "window": self.windowed,
            "distance_bias": self.bias is not None,
        }
        return tuple(name for name, used in given.items() if used)

    @property
    def parts(self) -> tuple:
        """All but scale, one by one, for a registered op; nothing where that is its default."""
        plain = self.cos is None and self.all_seen
        return () if plain else (self.cos, self.sin, self.bias, self.left, self.right)


def narrows(window: Sequence[int], longest: int) -> bool:
    """False for a window that holds whole sequences, which is none."""
    return tracing.is_compiling() or min(window) < longest - 1  # a size that is compared is fixed


def restored(scale: float, parts: tuple) -> Scores:
    """The scores whose parts went through a registered op one by one."""
    if not parts:
        return Scores(scale)
    return Scores(*(scale, *parts))  # the dispatcher leaves out what is the default at the end


def dense(scores: Scores) -> Scores:
    """The scores with dense tables, as kernels read them: one that is lazily negated is negated,
    as a layer's node calls a backend without torch's dispatcher, which would see to it."""
    if scores.cos is None and scores.bias is None:
        return scores
    cos, sin, bias = map(_dense, scores[1:4])
    return scores._replace(cos=cos, sin=sin, bias=bias)


def _dense(table: torch.Tensor | None) -> torch.Tensor | None:
    return None if table is None else table.contiguous().resolve_neg()


def put_line(line: torch.Tensor, grad: torch.Tensor) -> None:
    """The gradient of a bias, of that of each distance by itself. line: (heads, length), distance 0
    in the middle; what is beyond the bias's reach counts with its ends. line is used up."""
    reach, middle = grad.shape[1] // 2, line.shape[1] // 2
    first, end = max(middle - reach, 0), min(middle + reach + 1, line.shape[1])
    line[:, first] += line[:, :first].sum(1)
    line[:, end - 1] += line[:, end:].sum(1)
    if end - first < grad.shape[1]:
        grad.zero_()
    place = first - (middle - reach)
    grad[:, place : place + end - first] = line[:, first:end]


class Block(NamedTuple):
    """Queries from first and keys from start, up to but without last and end."""

    first: int
    last: int
    start: int
    end: int


def blocks(length: int, step: int, scores: Scores) -> list[Block]:
    """A sequence's queries, `step` at a time, with all keys that one of them may see."""
    found = []
    for first in range(0, length, step):
        last = min(first + step, length)
        keys = max(first - scores.left, 0), min(last + scores.right, length)
        found.append(Block(first, last, *keys))
    return found


def bucket_bias(weight: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
    """attention's distance_bias of a table by buckets, as T5's: (heads, distances).

    weight: (buckets, heads). buckets: int64 (distances,), the bucket of each distance key - query
    from -reach to reach. The gradient of weight is summed in one order, which that of
    weight[buckets] isn't on every device.
    """
    hit = buckets == torch.arange(weight.shape[0], device=buckets.device)[:, None]
    return torch.where(hit[:, None], weight[:, :, None], 0.0).sum(0)


def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k (B, S, H, D), rotated by each token's position in its row."""
    cos, sin = (table[: q.shape[1], None].to(q.dtype) for table in (cos, sin))
    plain = tracing.plain_call(q, k, cos, sin) and not tracing.only_reference()
    if torch.is_grad_enabled() or not plain:
        return _rotated(q, cos, sin), _rotated(k, cos, sin)
    # The same numbers in three passes, of which two go over halves, and one new tensor.
    both = torch.cat((cos, cos), -1)
    return _rotated_there(q, q * both, sin), _rotated_there(k, k * both, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    halves = first * cos, second * cos
    return torch.cat(
        (torch.addcmul(halves[0], second, sin, value=-1), torch.addcmul(halves[1], first, sin)), -1
    )


def _rotated_there(x: torch.Tensor, y: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """y, which is x by the cosines, made complete."""
    (first, second), (to_first, to_second) = x.chunk(2, -1), y.chunk(2, -1)
    to_first.addcmul_(second, sin, value=-1)
    to_second.addcmul_(first, sin)
    return y


def seen(block: Block, scores: Scores, device: torch.device) -> torch.Tensor:
    """(queries, keys) booleans of a block: True in a query's window."""
    query = torch.arange(block.first, block.last, device=device)[:, None]
    key = torch.arange(block.start, block.end, device=device)
    return (key >= query - scores.left) & (key <= query + scores.right)


def sees_any(key_mask: torch.Tensor, scores: Scores) -> torch.Tensor:
    """(B, S) booleans: the queries that have an attended key in their window."""
    length = key_mask.shape[1]
    before = F.pad(key_mask.int().cumsum(1), (1, 0))
    query = torch.arange(length, device=key_mask.device)
    start = (query - scores.left).clamp(min=0)
    end = (query + scores.right + 1).clamp(max=length)
    return before[:, end] > before[:, start]


def bias_matrix(bias: torch.Tensor, block: Block) -> torch.Tensor:
    """(heads, queries, keys): the bias of a block.

    Each row is the one before it, shifted by one: so it is made by cuts and views of one line of
    distances, whose gradients are sums in one order.
    """
    reach = bias.shape[1] // 2
    if tracing.is_compiling():  # a size that is compared can't change
        query = torch.arange(block.first, block.last, device=bias.device)[:, None]
        key = torch.arange(block.start, block.end, device=bias.device)
        return bias[:, (key - query).clamp(-reach, reach) + reach]
    least, most = block.start - block.last + 1, block.end - 1 - block.first
    inner = bias[:, max(least + reach, 0) : max(min(most, reach) + reach + 1, 0)]
    below = min(max(-reach - least, 0), most - least + 1)
    above = most - least + 1 - below - inner.shape[1]
    ends = bias[:, :1].expand(-1, below), bias[:, -1:].expand(-1, above)
    line = torch.cat((ends[0], inner, ends[1]), 1)
    return line.unfold(1, block.end - block.start, 1).flip(1)
