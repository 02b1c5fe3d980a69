"""The batch as every layer sees it: padded, or packed without its padding.

A padded batch is (rows, length, ...) with a mask of the tokens that are attended. Packing keeps
those tokens alone, row after row, as (1, tokens, ...): nothing is computed for padding. It happens
once before the first layer and is undone once after the last.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import checks, tracing
from ..tracing import can_look_at
from .buckets import Filled
from .layout import lay_out_array
from .lengths import check_bounds
from .looking import Padding, firsts_of, look, places_of
from .planning import plan as plan_batch
from .sequences import Sequences, sequences_of
from .tiles import Plan


class Copies:
    """The last layer's output as the next one's product reads it under autocast. A layer takes it
    for the very tensor that it was made of, if that hasn't changed since."""

    def __init__(self) -> None:
        self._of: weakref.ref | None = None
        self._version: int | None = None
        self._copy: torch.Tensor | None = None

    def keep(self, x: torch.Tensor, copy: torch.Tensor | None, clean: bool) -> None:
        """clean: x is seen, and so changed, by the layers alone. A tensor of torch.inference_mode
        counts no changes."""
        if copy is None or (x.is_inference() and not clean):
            self._copy = None
        else:
            self._of, self._version, self._copy = weakref.ref(x), _version(x), copy

    def take(self, x: torch.Tensor) -> torch.Tensor | None:
        copy, self._copy = self._copy, None
        if copy is None or self._of is None or self._of() is not x or _version(x) != self._version:
            return None
        return copy


class Shared:
    """Values that the layers of one forward share, made for the first that asks. room: for tables,
    positions of the longest sequence that may come; None: of this batch's longest."""

    def __init__(self, room: int | None = None) -> None:
        self.room = room
        self._made: dict[tuple, tuple[Any, Any]] = {}

    def of(self, source: Any, make: Callable[[], Any], *kind: object) -> Any:
        """The value, of a kind, made of this very object, which is kept, so that its id stays its
        own."""
        key = (id(source), *kind)
        known = self._made.get(key)
        if known is None:
            known = self._made[key] = source, make()
        return known[1]

    def tensors(self) -> list[torch.Tensor]:
        """All in the values, which are tensors and tuples, each once."""
        found, left = {}, [value for _, value in self._made.values()]
        while left:
            value = left.pop()
            if isinstance(value, torch.Tensor):
                found[id(value)] = value
            elif isinstance(value, tuple):
                left += value
        return list(found.values())


def _version(x: torch.Tensor) -> int | None:
    return None if x.is_inference() else x._version


@dataclass(frozen=True)
class Batch:
    """A padded or packed batch, once for all layers.

    Padded: key_mask, bool (rows, length), or None where every token is attended. Packed: cu_seqlens
    and what goes with it.
    """

    key_mask: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None  # int32 (rows + 1)
    max_seqlen: int | None = None
    plan: Plan | None = None
    index: torch.Tensor | None = None  # (tokens,): where each stands in the padded batch
    columns: torch.Tensor | None = None  # (tokens,): and where in its row
    firsts: torch.Tensor | None = None  # (rows,): where each row's first token stands in the packed
    sources: torch.Tensor | None = None  # (rows * length,): the token that comes back to each place
    padded_shape: tuple[int, int] | None = None  # of that batch; None if there never was one
    seed: torch.Tensor | None = None  # of the dropouts of all layers
    numbers: dict[int, int] | None = None  # of the layers, by their ids: what tells them apart
    clean: bool = False  # nothing hangs on any module of the layers: see nn/eligibility.py
    copies: Copies | None = None  # of a model's layers; None for one that is called by itself
    shared: Shared | None = None  # likewise
    kept: str | None = None  # why its padding was not taken out, where that shows in the values
    facts: Any = None  # of the layers' modules
    bucket: Filled | None = None  # in which a graph may serve it

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def layout(self) -> dict:
        """attention's arguments, for tensors of shape (rows, length, ...) or (1, tokens, ...)."""
        if self.packed:
            return dict(cu_seqlens=self.cu_seqlens, max_seqlen=self.max_seqlen, plan=self.plan)
        return dict(key_mask=self.key_mask)

    def once(self, source: Any, make: Callable[[], Any], *kind: object) -> Any:
        """Makes it for all layers, as Shared.of does, or for a layer that is called by itself."""
        return make() if self.shared is None else self.shared.of(source, make, *kind)

    def longest(self, x: torch.Tensor) -> int:
        """Positions that tables must have for the layers' tokens x."""
        if self.shared is not None and self.shared.room is not None:
            return self.shared.room
        known = self.max_seqlen if self.packed else None
        return x.shape[1] if known is None else known

    @functools.cached_property
    def sequences(self) -> Sequences:
        """attention's sequences, for all layers."""
        return sequences_of(
            self.key_mask, self.cu_seqlens, self.max_seqlen, self.plan, self.max_seqlen or 0
        )

    def told(self, **fields: Any) -> "Batch":
        """As dataclasses.replace, which takes 5 us."""
        made = object.__new__(Batch)
        made.__dict__.update(self.__dict__, **fields)
        made.__dict__.pop("sequences", None)
        return made

    def check(self, x: torch.Tensor) -> None:
        """Raises unless x is of this batch: (rows, length, width), or packed (1, tokens, width)."""
        if self.packed:
            total = None if self.plan is None else self.plan.total
            if x.shape[0] != 1 or total not in (None, x.shape[1]):
                raise ValueError(f"x must be the packed batch's, got shape {list(x.shape)}")
        elif self.key_mask is not None:
            checks.check_mask("key_mask", self.key_mask, x.shape[:2], x.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """On another device, for models that are spread over several."""
        fields: dict[str, Any] = {}
        for name in _TENSORS:
            value = getattr(self, name)
            fields[name] = None if value is None else value.to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, **fields)

    def on(self, device: torch.device) -> "Batch":
        """The batch where the last layer is, perhaps on another device than the first."""
        elsewhere = self.index is not None and self.index.device != device
        return self.to(device) if elsewhere else self

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, length, ...) -> (1, tokens, ...); a first size of 1 stands for every row."""
        (rows, length), index, _ = self._places()
        if x.shape[0] not in (1, rows) or x.shape[1] != length:
            raise ValueError(f"x must have shape [{rows} or 1, {length}, ...], got {list(x.shape)}")
        if x.shape[0] == 1 != rows and self.columns is not None:
            return x.index_select(1, self.columns)
        return x.flatten(0, 1).index_select(0, index)[None]

    def unpack(self, x: torch.Tensor, zeros: bool = False) -> torch.Tensor:
        """(1, tokens, ...) -> (rows, length, ...).

        Where a token was taken out its row's first token is repeated, without a gradient, or with
        `zeros` there are zeros. So what comes back is finite, has a direction, changes no maximum
        over a row, and carries nothing from one row to another.
        """
        (rows, length), index, first = self._places()
        packed = x[0]
        if self.sources is not None and not zeros and not torch.is_grad_enabled():
            return packed.index_select(0, self.sources).unflatten(0, (rows, length))
        flat = packed.new_empty(rows * length, *packed.shape[1:])
        if zeros:
            flat.zero_()
        else:
            firsts = packed.detach().index_select(0, first)
            flat.unflatten(0, (rows, length)).copy_(firsts[:, None])
        return flat.index_copy_(0, index, packed).unflatten(0, (rows, length))

    def _places(self) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
        """padded_shape, index and firsts."""
        if self.padded_shape is None or self.index is None or self.firsts is None:
            raise ValueError("the batch has no padded form: it is padded, or came packed")
        return self.padded_shape, self.index, self.firsts


_TENSORS = (
    *("key_mask", "cu_seqlens", "plan", "index", "columns", "firsts", "sources"),
    "seed",
)

_PLAIN = Batch()  # padded, without a mask

# Of lengths, or of rows and their one length, for tensors on a device.
Buckets = Callable[[np.ndarray | tuple[int, ...], torch.device], Filled | None]


def pack(
    mask: torch.Tensor,
    device: torch.device | None = None,
    backend: str = "auto",
    sort: bool = False,
    padding: Padding | None = None,
    buckets: Buckets | None = None,
    unbroken: bool = False,
) -> Batch:
    """The packed form, for tensors on `device`, of a batch by its mask, (rows, length), of 0 or
    False where a token is not attended. If nothing is padding: padded, without a mask.

    It stays padded, and `kept` says why, if a row's position 0 is masked, which poolers read, or if
    a masked token is not `padding`: it may be there to be read.

    sort: rows may change places, which only dropout shows; on a CPU those of one length then share
    attention calls. buckets: of the graphs that may serve it. unbroken: distances between tokens
    count, so it stays padded where a masked one lies between others. The host waits for the device
    once, if the mask is not on the CPU.
    """
    rows, length = mask.shape
    if mask.numel() == 0:
        return Batch()
    device = mask.device if device is None else device
    attended, lengths, begins, to_be_read = look(mask, padding)
    tokens = int(lengths.sum())
    if tokens == rows * length:
        return full(mask.shape, device, buckets)
    kept = None
    if not begins:
        kept = "a row begins with padding, or is nothing else"
    elif to_be_read:
        kept = "tokens at mask 0 are not the padding token: they may be there to be read"
    elif unbroken and not _are_unbroken(attended, lengths):
        kept = "masked tokens lie between others, whose distances count"
    if kept is not None:
        return Batch(key_mask=mask.bool().to(device), kept=kept)
    order, bucket = None, None
    if sort and mask.device.type == device.type == "cpu":
        order = np.argsort(lengths, kind="stable")
    elif buckets is not None:
        bucket = buckets(lengths, device)
    if bucket is not None:
        cu_seqlens, plan = bucket.plan()
    else:
        cu_seqlens, plan = lay_out_array(lengths if order is None else lengths[order], device)
    places = places_of(attended, lengths, order, not torch.is_grad_enabled())
    numbers = torch.from_numpy(places.numbers).to(device, non_blocking=True)
    index, columns, *rest = numbers.split_with_sizes(places.sizes)
    return _PLAIN.told(
        cu_seqlens=cu_seqlens,
        max_seqlen=plan.max_seqlen,
        plan=plan if _wants_plan(backend, device) else None,
        index=index,
        columns=columns,
        firsts=cu_seqlens[:-1] if order is None else torch.from_numpy(firsts_of(lengths, order)),
        sources=rest[0] if rest else None,
        padded_shape=(rows, length),
        bucket=bucket,
    )


def _are_unbroken(attended: np.ndarray, lengths: np.ndarray) -> bool:
    """True if each row's tokens, of which the first is attended, follow each other."""
    return bool((attended.astype(bool) == (np.arange(attended.shape[1]) < lengths[:, None])).all())


def full(
    shape: Sequence[int], device: torch.device | None = None, buckets: Buckets | None = None
) -> Batch:
    """The batch of (rows, length) tokens that are all attended."""
    if buckets is None or device is None:
        return Batch()
    return _PLAIN.told(bucket=buckets(tuple(shape), device))


def packed_by_caller(
    cu_seqlens: torch.Tensor,
    max_seqlen: int | torch.Tensor | None,
    tokens: int,
    device: torch.device,
    backend: str = "auto",
) -> Batch:
    """A batch that came packed, as (1, tokens), for tensors on `device`. Where cu_seqlens is not on
    the CPU, the host waits for max_seqlen if it isn't given."""
    longest: Any = max_seqlen
    if max_seqlen is None:
        longest = tokens if tracing.is_compiling() else cu_seqlens.diff().max().item()
    elif isinstance(max_seqlen, torch.Tensor):
        longest = max_seqlen.item()
    plan: Plan | None
    if device.type != "cpu" and tracing.on_host(cu_seqlens):
        bounds = cu_seqlens.numpy().astype(np.int64)
        check_bounds(bounds, longest, tokens, "the number of packed tokens")
        cu_seqlens, plan = lay_out_array(np.diff(bounds), device)
        longest = plan.max_seqlen
    else:
        cu_seqlens, plan = cu_seqlens.to(device, torch.int32), None
        if not tracing.is_compiling() and _wants_plan(backend, device):
            plan = plan_batch(cu_seqlens, longest, tokens)
    if not _wants_plan(backend, device):
        plan = None
    return Batch(cu_seqlens=cu_seqlens, max_seqlen=longest, plan=plan)


def _wants_plan(backend: str, device: torch.device) -> bool:
    """False where torch does the work on a GPU."""
    return backend != "torch" or device.type == "cpu"


def layout(
    mask: torch.Tensor | None,
    may_pack: bool,
    device: torch.device | None = None,
    backend: str = "auto",
    sort: bool = False,
    padding: Padding | None = None,
    buckets: Buckets | None = None,
    unbroken: bool = False,
) -> Batch:
    """The batch of a mask, for tensors on `device`: packed if that is allowed, pays, and the mask's
    values can be looked at. sort and what follows it: as in `batch.pack`."""
    if mask is None:
        return Batch()
    if may_pack and can_look_at(mask):
        return pack(mask, device, backend, sort, padding, buckets, unbroken)
    return Batch(key_mask=mask.bool() if device is None else mask.bool().to(device))
