"""attention_qkv where positions count: rotary positions (NomicBERT, ModernBERT), a window
(ModernBERT's local layers) and a bias by distance (MPNet).

Stock torch has none of the three in a kernel. It rotates q and k by operations of their own, as
transformers does, and is given a window as a mask and a bias as a matrix of all queries by all
keys. A model makes those once for all its layers, so they are made before a call, and the gradient
that is timed is the matrix's: a model adds those of its layers, and gathers the sum once.
flex_attention has a function for each, and is compiled together with the rotation.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ....ops import attention_qkv
from ....testing import attention as testing
from ....testing import positions
from ..case import normal
from ..floor import Work, pairs_of
from ..floor import attention as attention_work
from ..models import full_batch, mixed_batch
from ..op_case import Inputs
from ..predicted import Counts, flash_share
from ..providers import Provider
from .attention import BASE, SDPA, sdpa
from .attention_qkv import AttentionQKVCase

Tensor = torch.Tensor
Tables = tuple[Tensor, Tensor]
Window = tuple[int, int]
Form = dict[str, Any]  # of a case


class Positions(NamedTuple):
    """All that a model makes once for its layers."""

    rotary: Tables | None = None  # float32, (positions, head_dim / 2)
    halves: Tables | None = None  # the same in the case's dtype
    wholes: Tables | None = None  # for both halves of a head: (positions, head_dim)
    window: Window | None = None
    reach: int = 0  # of a bias
    mask: Tensor | None = None  # the window's and the padding's, of queries by keys
    blocks: Any = None  # flex_attention's mask
    in_place: bool = False  # what is timed is a backward, whose q and k were rotated in place


# Ours.


class _ours:
    packed = True

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, qkv: Tensor, how: Positions, p: float, **more: Any) -> Tensor:
        more |= {"rotary": how.rotary, "window": how.window}
        return attention_qkv(qkv, dropout_p=p, backend=self.backend, **more)


# Stock torch.


def _rotated(qkv: Tensor, how: Positions) -> tuple[Tensor, ...]:
    """q, k and v, each (rows, length, heads, head_dim), the first two by their positions: in the
    operations of transformers, which are those of q and k at once."""
    if how.rotary is None or how.wholes is None:
        return qkv.unbind(2)
    tables = how.wholes
    if tables[0].dtype != qkv.dtype:  # float64, whose numbers are to be right
        tables = _wide(how.rotary, qkv.dtype)
    cos, sin = (table[:, None, None] for table in tables)
    both = qkv[:, :, :2]
    first, second = both.chunk(2, -1)
    both = both * cos + torch.cat((-second, first), -1) * sin
    return *both.unbind(2), qkv[:, :, 2]


def _wide(tables: Tables, dtype: torch.dtype) -> Tables:
    cos, sin = (torch.cat((table, table), -1).to(dtype) for table in tables)
    return cos, sin


class _sdpa:
    """By one of torch's kernels, or by torch's own choice."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __call__(
        self, qkv: Tensor, how: Positions, seed: Tensor, p: float, matrix: Tensor | None = None
    ) -> Tensor:
        """matrix: of biases, (heads, queries, keys)."""
        mask = how.mask
        if matrix is not None:
            mask = matrix[None] if mask is None else torch.where(mask, matrix, -torch.inf)
        q, k, v = _rotated(qkv, how)
        return sdpa(q, k, v, seed, p, mask, self.kernel)


def _flex(
    attend: Callable,
    qkv: Tensor,
    how: Positions,
    seed: Tensor,
    p: float,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """attend: flex_attention, to be compiled with all of this."""
    table, reach = distance_bias, how.reach

    def with_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert table is not None
        return score + table[h, (key - query).clamp(-reach, reach) + reach]

    q, k, v = (part.transpose(1, 2) for part in _rotated(qkv, how))
    score_mod = None if table is None else with_bias
    return attend(q, k, v, score_mod=score_mod, block_mask=how.blocks).transpose(1, 2)


_flex.packed = True  # type: ignore[attr-defined]  # its bias is a table, as ours is


def block_mask(window: Window, length: int, device: str) -> Any:
    """flex_attention's, of a window."""
    from torch.nn.attention.flex_attention import create_block_mask

    left, right = window

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= query - left) & (key <= query + right)

    return create_block_mask(seen, None, None, length, length, device=device)


# flash-attn.


class _RotatedInPlace(torch.autograd.Function):
    """A copy of qkv, rotated in place, as its gradient is, by flash-attn's kernel."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, tables: Tables, layout: dict[str, Any]) -> Tensor:
        ctx.tables, ctx.layout = tables, layout
        return _rotate(qkv.clone(), tables, layout)

    @staticmethod
    def backward(ctx: Any, dqkv: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(dqkv, ctx.tables, ctx.layout, conjugate=True), None, None


def _rotate(qkv: Tensor, tables: Tables, layout: dict[str, Any], conjugate: bool = False) -> Tensor:
    from flash_attn.ops.triton.rotary import apply_rotary

    heads = qkv[..., :2, :, :].flatten(-3, -2)  # a view
    apply_rotary(heads, *tables, **layout, inplace=True, conjugate=conjugate)
    return qkv


def _flash_attn(
    qkv: Tensor,
    how: Positions,
    seed: Tensor,
    p: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    plan: object = None,
) -> Tensor:
    """The flash-attn package's kernels.

    A model lets it rotate q and k where they lie. Here they are read by the next call too: so a
    forward writes them elsewhere, which moves as much. Before a backward they are copied, which is
    not timed, and their gradients are rotated in place.
    """
    import flash_attn

    layout: dict[str, Any] = {}
    if cu_seqlens is not None:
        layout = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    window = how.window or (-1, -1)
    if how.halves is not None and not how.in_place:
        from flash_attn.layers.rotary import apply_rotary_emb

        heads = apply_rotary_emb(qkv[..., :2, :, :].flatten(-3, -2), *how.halves, **layout)
        (q, k), v = heads.chunk(2, -2), qkv[..., 2, :, :]
        if cu_seqlens is None:
            return flash_attn.flash_attn_func(q, k, v, p, window_size=window)
        bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return flash_attn.flash_attn_varlen_func(q, k, v, *bounds, p, window_size=window)
    if how.halves is not None:
        qkv = _RotatedInPlace.apply(qkv, how.halves, layout)
    if cu_seqlens is None:
        return flash_attn.flash_attn_qkvpacked_func(qkv, p, window_size=window)
    return flash_attn.flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, max_seqlen, p, window_size=window
    )


_flash_attn.packed = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class PositionsCase(AttentionQKVCase):
    rotary: bool = False
    window: Window | None = None
    reach: int | None = None  # of a bias

    functions = {
        "bertfast": _ours,
        **{name: _sdpa(kernel) for name, kernel in SDPA.items()},
        "torch flex": _flex,
        "flash-attn": _flash_attn,
    }

    @property
    def masked(self) -> bool:
        return super().masked or self.window is not None or self.biased

    @property
    def biased(self) -> bool:
        return self.reach is not None

    @property
    def shape(self) -> str:
        words = [super().shape, *["rotary"] * self.rotary]
        words += [] if self.window is None else ["window {}+{}".format(*self.window)]
        return " ".join([*words, *([f"bias {self.reach}"] if self.biased else [])])

    @property
    def form(self) -> tuple:
        return (*super().form, None, self.for_budget().features)

    def work(self) -> list[Work]:
        """Of a window the pairs of tokens that see each other. All tables are read, and in the
        backward the gradient of the bias is written."""
        (whole,) = super().work()
        lengths, width = self.tokens.lengths, self.heads * self.head_dim
        backward = self.pass_ == "backward"
        seen = attention_work(lengths, width, self.dtype.itemsize, backward, self.window)
        tables = 4 * self.tokens.longest * self.head_dim if self.rotary else 0
        if self.reach is not None:
            table = self.heads * (2 * self.reach + 1) * self.dtype.itemsize
            tables += table * (2 if backward else 1)
        return [Work("attention", seen.flops, whole.bytes + tables)]

    def counts(self, provider: Provider) -> Counts | None:
        """In units of q, beside what attention reads and writes at least:

        rotation         q and k read and written, in a kernel; by stock torch in five: two products
                         read and write both, of one half the sign is changed, halves are put
                         beside each other, and a sum reads both twice
        our backward     q, k, v and the output's gradient read by its second kernel too
        A bias isn't counted: what gathering it takes isn't in the model's share. Of the others'
        backward, and of a mask, the kernels' own traffic isn't known.
        """
        backward, ours = self.pass_ == "backward", provider.name == "bertfast triton"
        stock = provider.name == "torch sdpa flash"
        known = ours or ((stock or provider.name == "flash-attn") and not backward)
        if self.biased or self.dtype.itemsize != 2 or not known:
            return None
        (work,) = self.work()
        pairs = pairs_of(self.tokens.lengths, self.window)
        share = flash_share(self.tokens.real, pairs, backward)
        units, kernels = (4, 2) if backward else (0, 1)
        if self.rotary:
            units, kernels = units + (20 if stock else 4), kernels + (5 if stock else 1)
        moved = units * self.tokens.real * self.heads * self.head_dim * self.dtype.itemsize
        return Counts(kernels, moved, attention=((work, share),))

    def inputs(self, device: str, seed: int) -> Inputs:
        made = super().inputs(device, seed)
        more = {name: value for name, value in made.more.items() if name != "mask"}
        more["how"] = self._how(device)
        leaves, ours = dict(made.leaves), made.packed or made
        if self.reach is None and made.packed is None:
            return Inputs(leaves, made.dy, more)
        our_leaves = dict(ours.leaves)
        if self.reach is not None:
            values = normal(device, seed + 1000, self.dtype)
            table = values(self.heads, 2 * self.reach + 1)
            our_leaves["distance_bias"] = table
            matrix = positions.bias_of(table, self.tokens.longest, self.dtype)
            leaves["matrix"] = torch.as_tensor(matrix)
        packed = Inputs(our_leaves, ours.dy, ours.more | more)
        return Inputs(leaves, made.dy, more, packed)

    def _how(self, device: str) -> Positions:
        length = self.tokens.longest
        how = Positions(None, window=self.window, reach=self.reach or 0)
        if self.rotary:
            cos, sin = (t.to(device) for t in positions.tables(length, self.head_dim))
            halves = cos.to(self.dtype), sin.to(self.dtype)
            wholes = _wide((cos, sin), self.dtype)
            how = how._replace(rotary=(cos, sin), halves=halves, wholes=wholes)
        mask = None
        if self.packed:  # what is padding sees all that it may
            real = self.tokens.mask(device)
            mask = (real[:, None] | ~real[:, :, None])[:, None]
        if self.window is not None:
            inside = positions.in_window(length, self.window).to(device)
            mask = inside if mask is None else mask & inside
            how = how._replace(blocks=block_mask(self.window, length, device))
        return how._replace(mask=mask, in_place=self.pass_ == "backward")

    def for_budget(self) -> testing.Case:
        by_position: Form = {"rotary": self.rotary, "window": self.window, "reach": self.reach}
        layout: Form = {"packed": self.packed, "plan": self.packed, "p": self.dropout}
        return testing.Case((40, 150), self.heads, self.head_dim, **layout, **by_position)


NOMIC: Form = {"rotary": True}  # and ModernBERT's other layers
LOCAL: Form = {"rotary": True, "window": (64, 64)}
MPNET: Form = {"reach": 128}
_PASSES = ("forward", "backward", "training")


def gpu_cases() -> list[PositionsCase]:
    """NomicBERT, ModernBERT and MPNet, each base in bf16; then a long batch and a packed one."""
    bf16 = torch.bfloat16
    long, packed = full_batch(2, 4096), mixed_batch("wikipedia", 64)
    first = ((full_batch(32, 512), NOMIC), (full_batch(16, 1024), LOCAL))
    mpnet = full_batch(32, 512)
    found = []
    for pass_ in _PASSES:
        found += [PositionsCase(pass_, *(tokens, *BASE, bf16), **how) for tokens, how in first]
        p = 0.0 if pass_ == "forward" else 0.1  # the models before have none in attention
        found.append(PositionsCase(pass_, *(mpnet, *BASE, bf16, p), **MPNET))
    found.append(PositionsCase("backward", *(mpnet, *BASE, bf16), **MPNET))
    rest = itertools.product(_PASSES[:2], (long, packed))
    return found + [PositionsCase(pass_, *(t, *BASE, bf16), **LOCAL) for pass_, t in rest]


def cpu_cases() -> list[PositionsCase]:
    tokens, fp32 = full_batch(2, 512), torch.float32
    return [PositionsCase("forward", *(tokens, *BASE, fp32), **how) for how in (LOCAL, MPNET)]


def dry_cases() -> list[PositionsCase]:
    full, mixed = full_batch(2, 20), mixed_batch("queries", 2)
    fp16, bf16 = torch.float16, torch.bfloat16
    local: Form = {"rotary": True, "window": (3, 5)}
    return [
        PositionsCase("forward", *(mixed, 1, 16, fp16), **local),
        PositionsCase("training", *(full, 1, 16, bf16, 0.1), rotary=True),
        PositionsCase("backward", *(mixed, 1, 16, fp16), **local),
        PositionsCase("backward", *(full, 1, 16, bf16, 0.1), reach=4),
    ]
