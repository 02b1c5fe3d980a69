"""CUDA graphs by bucket: in inference a stack of layers is captured once and replayed.

The host needs longer to launch the kernels of a small batch than a GPU to run them. So where
`optimize(model, graphs=...)` asked for it, the batch is filled up to a bucket of tokens
(packing/buckets.py) and the stack is launched as one graph: what changes from batch to batch, the
tokens and the list of sequences, is copied to where the graph reads it.

A bucket is captured when it comes the second time, all from one pool of memory, and the one that
was used longest ago goes where there would be too many. A graph reads weights by their addresses;
`_Watched.stamp` is all that it was captured with, and where that has changed all graphs go. One
lock lets one call at a time use the memory that they share, and an event orders the streams.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from . import checks, tracing
from .nn.eligibility import Facts
from .nn.modules import Weights, has_own_forward, plain, read_linear, read_norm
from .nn.parts import Parts, read
from .nn.watching import comparisons
from .notice import warn_once
from .ops.layer_norm.run import Norm
from .packing.batch import Batch, Buckets, Shared
from .packing.buckets import MOST_TOKENS, Bucket, Filled, fill, rungs, whole
from .packing.tiles import SMALL_TILE, TILE
from .settings import GRAPHS

__all__ = ["GRAPHS", "Finish", "Graphs", "Limits", "warm_up"]

MOST_GRAPHS = 64
MOST_SHAPES = 256  # batches without padding whose lists of sequences are kept
USUAL_TOKENS, USUAL_WIDTH = 8192, 768  # beyond these a GPU is busy longer than the host

Run = Callable[[torch.Tensor, Batch], torch.Tensor]
Finish = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Limits:
    """Bounds of one model's graphs. tokens: of a batch; by default 8192 for a width of 768, and
    elsewhere as many as take a GPU as long. memory: bytes that all graphs may hold together."""

    tokens: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None:
            checks.check_int("tokens", self.tokens, 1, MOST_TOKENS)
        if self.memory is not None:
            checks.check_int("memory", self.memory, 1)

    def most(self, width: int) -> int:
        if self.tokens is not None:
            return self.tokens
        return min(MOST_TOKENS, max(512, int(USUAL_TOKENS * (USUAL_WIDTH / width) ** 2)))


class Recording:
    """All that a function launches, to be launched again. The function has run before."""

    def __init__(self, function: Callable[[], None], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # cuBLAS has a workspace for each stream, which others' calls use too. One that is made
        # within the capture belongs to the pool, and nobody else finds it afterwards.
        _forget_workspaces()
        # Others' threads may allocate meanwhile. torch.cuda.graph would empty the caches first.
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            function()
        finally:
            self._graph.capture_end()
            _forget_workspaces()

    def replay(self) -> None:
        self._graph.replay()


# As torch's compiler does around its captures.
_forget_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)


class Counts(NamedTuple):
    """Of one stack's graphs, so far."""

    buckets: tuple[Bucket, ...]
    bytes: int
    hits: int
    captures: int
    refused: str | None  # why nothing is captured any more

    def __str__(self) -> str:
        if self.refused is not None:
            return f"launches no CUDA graphs: {self.refused}"
        tokens = [bucket.tokens for bucket in self.buckets]
        sizes = f" of {min(tokens)} to {max(tokens)} tokens" if tokens else ""
        return (
            f"launches CUDA graphs: {len(tokens)} buckets{sizes}, {self.bytes / 2**20:.0f} MiB, "
            f"{self.captures} captures, {self.hits} hits"
        )


class Graphs:
    """The graphs of one stack of layers. A copy or a pickle of it has none."""

    def __init__(self, limits: Limits, width: int) -> None:
        self.limits, self.width = limits, width
        self.most = limits.most(width)
        self.hits = self.captures = 0
        self.outputs: Any = None  # the class of what the encoder returns
        self._settled = False
        self._shapes: dict[tuple, Filled | None] = {}
        self._lock = threading.Lock()
        self._held: _Held | None = None
        self._watched: _Watched | None = None

    def __deepcopy__(self, memo: dict) -> "Graphs":
        return Graphs(self.limits, self.width)

    def __reduce__(self) -> tuple:
        return Graphs, (self.limits, self.width)

    def offered(self, x: torch.Tensor) -> Buckets | None:
        """The buckets, where a graph may stand for what is done with x now, in eval."""
        may_serve = (
            x.is_cuda
            and not torch.is_grad_enabled()
            and tracing.plain_call(x)
            and not tracing.only_reference()
            and tracing.autocast(x) is None
            and not tracing.is_capturing(x)
        )
        return self.buckets if may_serve else None

    def buckets(self, lengths: np.ndarray | tuple[int, ...], device: torch.device) -> Filled | None:
        """packing.batch.Buckets."""
        if isinstance(lengths, np.ndarray):
            return fill(lengths, device, self.most)
        found = self._shapes.get(lengths)
        if found is None and lengths not in self._shapes:
            if len(self._shapes) >= MOST_SHAPES:
                self._shapes.clear()
            rows, length = lengths
            same = np.full(rows, length, dtype=np.int64)
            # On the host, as each call may have a stream of its own.
            found = self._shapes[lengths] = fill(same, torch.device("cpu"), self.most)
        return found

    def serve(self, x: torch.Tensor, batch: Batch, run: Run, finish: Finish) -> torch.Tensor | None:
        """finish(run(x, batch)) by a graph, of tokens x (..., width); None where it has to be run.
        run: the layers, for (1, tokens, width), which may change the width. finish: of the shape
        that x has, gives memory that is the caller's."""
        filled, facts = batch.bucket, batch.facts
        if filled is None or batch.seed is not None or not batch.clean:
            return None
        # That graphs may serve was asked when the bucket was chosen.
        if not (x.is_cuda and tracing.are_plain((x,))):
            return None
        watched = self._watched
        if watched is None or watched.facts is not facts or not watched.holds():
            watched = self._watched = _Watched(facts)
        if watched.why_not is not None:
            return None
        stamp = watched.stamp(x)
        with self._lock:
            held = self._held
            if held is None or held.stamp != stamp:
                held = self._renew(stamp, x, facts)
            recording = held.take(filled.bucket)
            if recording is None:
                recording = self._capture(held, filled, run)
                if recording is None:
                    return None
            else:
                self.hits += 1
            stream = torch.cuda.current_stream(x.device)
            held.begin(stream)
            held.fill(filled)
            tokens, made = held.places(x.shape)
            tokens.copy_(x)
            recording.replay()
            y = finish(made)
            held.end(stream)
            return y

    def _renew(self, stamp: tuple, x: torch.Tensor, facts: Facts) -> "_Held":
        """Graphs by the stamp, in place of those that don't hold any more."""
        seen: set[Bucket] = set()
        if self._held is not None and not (self._held.recordings or self._settled):
            seen = self._held.seen  # the first call moved q, k and v into one place
            self._settled = True
        self._held = _Held(stamp, x, facts, self, seen)
        return self._held

    def _capture(self, held: "_Held", filled: Filled, run: Run) -> Recording | None:
        if not held.wants(filled.bucket):
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                recording = held.capture(filled, run)
        except RuntimeError as error:
            held.refused = str(error).strip().splitlines()[0]
            warn_once(f"captures no CUDA graph: {held.refused}")
            return None
        if recording is not None:
            self.captures += 1
        return recording

    def told(self) -> Counts:
        held = self._held
        buckets = () if held is None else tuple(held.recordings)
        size = 0 if held is None else held.bytes
        reasons = (self._watched and self._watched.why_not, held and held.refused)
        refused = next((str(reason) for reason in reasons if reason), None)
        return Counts(buckets, size, self.hits, self.captures, refused)


def warm_up(model: nn.Module, shapes: Iterable[tuple[int, int]] | None = None) -> None:
    """Captures the graphs of a converted model before its first request.

    shapes: batches, (rows, length), whose buckets are captured; by default all buckets that usual
    batches come to, up to the bound of tokens. The model is called with each of them some times,
    on whatever it was made for, in eval and where it is.

    Raises ValueError where no graph could serve: no `optimize(model, graphs=...)`, a model in
    training or not on a GPU, a layer of which a module has to be called.
    """
    checks.check_module("model", model)
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "graphs_of_layers")]
    found = [(m, graphs) for m in modules if (graphs := m.graphs_of_layers()) is not None]
    if not found:
        raise ValueError("model must be converted by optimize(model, graphs=True) before")
    for module, graphs in found:
        if module.training:
            raise ValueError("model must be in eval, graphs are for inference")
        if any(parameter.device.type != "cuda" for parameter in module.parameters()):
            raise ValueError("model must be on a GPU, graphs are CUDA's")
        for rows, length in _usual(graphs.most) if shapes is None else shapes:
            checks.check_int("rows", rows, 1)
            checks.check_int("length", length, 1)
            before = graphs.captures
            for _ in range(MOST_CALLS):
                hits = graphs.hits
                with torch.inference_mode():
                    module.call_with(rows, length)
                if graphs.captures > before or graphs.hits > hits:
                    break
            else:
                reason = graphs.told().refused or "it is beyond the limits"
                raise ValueError(f"no graph can serve {rows} x {length} tokens: {reason}")


# A stack that is called the first time moves weights, the second time its batch is seen, the third
# time it is captured.
MOST_CALLS = 3


def _usual(most: int) -> Iterator[tuple[int, int]]:
    """Batches that fill the buckets of both tiles, the largest first: others then find memory."""
    for tokens in reversed(list(rungs(1, most))):
        yield tokens // TILE, TILE
        if tokens <= MOST_SHORT:
            yield tokens // SMALL_TILE, SMALL_TILE


MOST_SHORT = 2048  # tokens of batches of very short sequences


# Attributes of modules, and of their configurations, that a capture reads besides parameters.
_VALUES = (
    *("eps", "scaling", "num_attention_heads", "attention_head_size", "num_heads", "approximate"),
    *("n_heads", "head_dim", "attention_type"),
    *("intermediate_act_fn", "activation"),  # where they are functions
)
_CONFIGURED = "num_attention_heads", "local_attention"


class _Watched:
    """All in the layers that a graph depends on, found once for the modules as they are now."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        layers: Any = tuple(dict.fromkeys(facts.layers))  # each once
        self.why_not = next(filter(None, map(_why_not, layers)), None)
        if not all(map(_may_be_read, facts.beside)):
            self.why_not = "a module beside the layers has to be called"
        modules = [module for part in (*layers, *facts.beside) for module in part.modules()]
        places = [(m._parameters, name) for m in modules for name in m._parameters]
        places += [(vars(m), name) for m in modules for name in _VALUES if name in vars(m)]
        configs = {id(c): vars(c) for m in modules if (c := vars(m).get("config")) is not None}
        places += [(c, name) for c in configs.values() for name in _CONFIGURED if name in c]
        buffers = [(m._buffers, name) for m in facts.tables for name in m._buffers]
        own = [(vars(m), name) for m in facts.tables for name in vars(m) if name[0] != "_"]
        places += buffers + own
        self._owners, self._names = [where for where, _ in places], [name for _, name in places]
        self._objects = list(map(getitem, self._owners, self._names))
        self._parameters = [one for one in self._objects if isinstance(one, torch.Tensor)]
        # A graph reads parameters anew each time, but tables that were made of these.
        self._made_of = [one for where, name in buffers if (one := where[name]) is not None]
        if any(buffer.is_inference() for buffer in self._made_of):
            self.why_not = "a module for tables was made in inference mode: changes aren't counted"
        self._compare = comparisons()

    def holds(self) -> bool:
        """True if the modules have the parameters and the attributes that they had."""
        return self._compare.holds(self._owners, self._names, self._objects)

    def stamp(self, x: torch.Tensor) -> tuple:
        memory = self._compare.memory_of(self._parameters)
        versions = [buffer._version for buffer in self._made_of]
        return self, x.device, x.dtype, x.shape[-1], memory, versions


def _may_be_read(module: nn.Module) -> bool:
    """True for a module beside the layers, without hooks, that does now what it always does."""
    read_ = (read_norm(module, clean=True), read_linear(module, clean=True))
    if isinstance(read_[0], Norm) or isinstance(read_[1], Weights):
        return True
    return type(module) is nn.Embedding and plain(module.weight)


def _why_not(layer: Any) -> str | None:
    """Why a layer can't be captured: a graph would keep what a called module does now."""
    if not hasattr(layer, "parts"):
        return f"a {type(layer).__name__} is among the layers"
    parts: Parts = layer.parts()
    now: Any = read(parts, clean=True)
    kinds = {type(one) for part in now for one in (part if type(part) is tuple else (part,))}
    if has_own_forward(nn.Identity):
        kinds.discard(nn.Identity)
    known = parts.approximate if parts.gated is None else parts.gated.activation
    if kinds - {Weights, Norm, float} or known is None:
        return "a module of a layer has to be called"
    return None


class _Held:
    """The graphs that hold for one stamp, and the memory that they share."""

    def __init__(
        self, stamp: tuple, x: torch.Tensor, facts: Facts, owner: Graphs, seen: set[Bucket]
    ) -> None:
        self.stamp = stamp
        self._facts = facts
        self.recordings: OrderedDict[Bucket, Recording] = OrderedDict()
        self.refused: str | None = None
        self.bytes = 0
        self.seen = seen
        self._memory, self._most = owner.limits.memory, owner.most
        self._device, self._dtype = x.device, x.dtype
        # Before the layers and after: one memory, if that is the same.
        self._widths = tuple(dict.fromkeys((x.shape[-1], owner.width)))
        if self._memory is not None:  # which the tokens of the largest batch must not exceed
            self._most = min(self._most, self._memory // (sum(self._widths) * x.element_size()))
        # What is made once, of all batches: tables, for the longest sequence that may come.
        self._shared = Shared(self._most)
        self._filled: Filled | None = None  # whose sequences the graphs read now
        self._places: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}
        self._used: tuple[Any, Any] | None = None  # the stream that used it last, and an event

    def take(self, bucket: Bucket) -> Recording | None:
        recording = self.recordings.get(bucket)
        if recording is not None:
            self.recordings.move_to_end(bucket)
        return recording

    def wants(self, bucket: Bucket) -> bool:
        """True if the bucket came before and may be captured."""
        if self.refused is not None or bucket.tokens > self._most:
            return False
        if bucket in self.seen:
            return True
        self.seen.add(bucket)
        return False

    def begin(self, stream: Any) -> None:
        """Has this stream wait for the one that used the memory before."""
        if self._used is not None and self._used[0] != stream:
            stream.wait_event(self._used[1])
            for shared in self._read():  # which may be let go while this stream is at it
                shared.record_stream(stream)

    def end(self, stream: Any) -> None:
        event = torch.cuda.Event() if self._used is None else self._used[1]
        event.record(stream)
        self._used = stream, event

    def fill(self, filled: Filled) -> None:
        """Has the graphs read this batch's sequences, unless it is those of the last."""
        if self._filled is not filled:
            self.numbers[: filled.bucket.size].copy_(filled.numbers, non_blocking=True)
            self._filled = filled

    def places(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """The place of a batch's tokens, and that of what is made of them."""
        found = self._places.get(shape)
        if found is None:
            if len(self._places) >= MOST_SHAPES:
                self._places.clear()
            count = math.prod(shape[:-1])
            x, y = (memory[:count].view(*shape[:-1], -1) for memory in (self.x, self.y))
            found = self._places[shape] = x, y
        return found

    def _allocate(self) -> None:
        """The memory that batches are copied to, and the pool of all graphs."""
        options: Any = dict(dtype=self._dtype, device=self._device)
        memory = [torch.zeros(self._most, width, **options) for width in self._widths]
        self.x, self.y = memory[0], memory[-1]
        sizes = (Bucket(self._most, tile).size for tile in (SMALL_TILE, TILE))
        self.numbers = torch.zeros(max(sizes), dtype=torch.int32, device=self._device)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)  # of captures
        self.bytes = sum(one.nbytes for one in self._read())

    def _read(self) -> list[torch.Tensor]:
        """All that graphs read or write, beside parameters and the pool."""
        also = () if self.x is self.y else (self.y,)
        return [self.x, self.numbers, *also, *self._shared.tensors()]

    def _batch(self, bucket: Bucket) -> Batch:
        """Whatever batch is in the bucket when a graph runs."""
        cu_seqlens, plan = whole(bucket, self.numbers)
        facts = self._facts
        return Batch(
            *(None, cu_seqlens, plan.max_seqlen, plan),
            numbers=facts.numbers,
            clean=facts.clean,
            facts=facts,
            shared=self._shared,
        )

    def capture(self, filled: Filled, run: Run) -> Recording | None:
        bucket = filled.bucket
        if not self.bytes:
            self._allocate()
        reserved = torch.cuda.memory_reserved(self._device)
        tables = sum(table.nbytes for table in self._shared.tensors())
        batch = self._batch(bucket)
        tokens, made = self.x[: bucket.tokens], self.y[: bucket.tokens]

        def function() -> None:
            made.copy_(run(tokens[None], batch)[0])

        current, stream = torch.cuda.current_stream(self._device), self._stream
        self.begin(current)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                self.fill(filled)
                tokens.zero_()  # whatever was there, also of a bucket that is larger
                function()  # loads kernels, and gathers weights
                recording = Recording(function, self._pool)
        finally:
            current.wait_stream(stream)
            self.end(current)
            for table in self._shared.tensors():  # which the stream of captures has made
                table.record_stream(current)
        tables = sum(table.nbytes for table in self._shared.tensors()) - tables
        self.bytes += max(tables, torch.cuda.memory_reserved(self._device) - reserved)
        if self._memory is not None and self.bytes > self._memory:
            # Larger buckets need no less. What this one took, the next ones find in the pool.
            self._most = bucket.tokens - 1
            return None
        self.recordings[bucket] = recording
        if len(self.recordings) > MOST_GRAPHS:
            self.recordings.popitem(last=False)
        return recording
