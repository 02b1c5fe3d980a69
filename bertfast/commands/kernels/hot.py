"""The hot path of a kernel with tensor cores: a turn of its main loop in which every score counts.

Of all paths through all loops, and through a kernel without a loop, it is the one of the fewest
instructions that does the work of such a turn:

    exactly     rows x columns x head dimension multiply-adds for each product
    at least    two tiles loaded; with dropout a draw for each 8 scores; in an online softmax the
                sums scaled, as they are when a row's largest score has grown

So a path that leaves out a product, or does one twice, isn't taken for it, nor is a last turn,
which loads nothing. Where no path has this work, `bertfast kernels` fails.

Bulk copies are started by one of a block's warps. Where that warp multiplies as well, the others'
turns, without it, count for as many as there are.

Of a product whose sums are used when its loop is done, what is outside the loop is counted too: on
the cheapest path through the kernel that passes the loop and writes all outputs.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...ops.aot import Work
from . import pipes
from .flow import Flow, Instruction

_WAIT = "WARPGROUP.DEPBAR"
_TILE = 1 << 48  # a tile of tcgen05 in a sum with multiply-adds
_MULTIPLIES_BY = {"HMMA": "mma.sync", "HGMMA": "wgmma"}
_SCALINGS = {"FMUL": 1, "FMUL2": 2}
# Philox has two wide products in each of 7 rounds; of the first three, some are the same each turn.
_WIDE_PRODUCTS = 8
_SCORES_OF_A_DRAW = 8
_OPERANDS = 2  # of a product


@dataclass(frozen=True)
class Hot:
    """Figures per score, but for those that say something else."""

    instructions: float
    shared_bytes: float | None  # None: tcgen05 reads by descriptors, which aren't read here
    cache_bytes: float
    loads: int  # global loads of a turn
    late_loads: int  # of these, those that the turn waits for before its first product
    waits: int  # for wgmma, in a turn, or in one of the turns inside
    products: int
    mma_sync: int  # instructions of a turn
    rows: int
    columns: int
    head_dim: int
    pipes: dict[str, float] = field(default_factory=dict)  # instructions by pipe
    multiply_adds: dict[str, float] = field(default_factory=dict)  # by mma.sync, by wgmma
    outside: float | None = None  # instructions outside the main loop; None: nothing is to be there


def find(flow: Flow, work: Work, threads: int, loop: bool) -> Hot | None:
    """The hot path's figures; None if no path has the turn's multiply-adds. loop: whether it is a
    turn of a loop; one that was unrolled altogether is looked for as well."""
    warps = threads // 32
    tcgen05 = any(pipes.is_tcgen05(one) for one in flow.code)
    scores = work.rows * work.columns
    # By tcgen05 one thread multiplies tiles of 64 rows or more, 16 deep, which are counted.
    tiles = [depth // 16 for rows, depth in work.products if tcgen05 and rows >= 64]
    by_warps = len(work.products) - len(tiles)
    products = scores * work.head_dim * by_warps // warps + _TILE * sum(tiles)
    draws = scores // threads * _WIDE_PRODUCTS // _SCORES_OF_A_DRAW if work.dropout else 0
    scalings = work.rows * work.head_dim // threads if work.scales else 0
    # What bulk copies read is known to their descriptors only: one for each operand is asked for,
    # where the warps that multiply start them.
    bulk = any(one.base == "UTMALDG" for one in flow.code)
    streamed = _OPERANDS if bulk else 4 * work.streamed * work.head_dim // warps
    wanted = (products, streamed, draws, scalings)

    @functools.cache
    def done(block: int) -> tuple[int, ...]:
        ones = list(flow.instructions_of(block))
        return (
            sum(pipes.multiply_adds(one) + _TILE * pipes.is_tcgen05(one) for one in ones),
            sum(one.base == "UTMALDG" for one in ones)
            if bulk
            else sum(pipes.cache_bytes(one) for one in ones if one.base in ("LDG", "LDGSTS")),
            sum(_is_philoxs(one) for one in ones),
            sum(_SCALINGS.get(one.base, 0) for one in ones),
        )

    starts = [start for start, (body, _) in flow.loops.items() if any(done(b)[0] for b in body)]
    is_loop = loop and bool(starts)
    candidates: list[int | None] = [*starts] if is_loop else [None]
    paths = {}
    for start in candidates:
        elsewhere = bulk and start is not None and not any(done(b)[1] for b in flow.loops[start][0])
        here = (products, 0, draws, scalings) if elsewhere else wanted
        paths[start] = flow.cheapest(start, done, here, work.turns)
    turns = {
        start: [(one, times) for block, times in path for one in flow.instructions_of(block)]
        for start, path in paths.items()
        if path is not None
    }
    if not turns:
        return None
    start = min(turns, key=lambda start: sum(times for _, times in turns[start]))
    turn = turns[start]
    average: Sequence[tuple[Instruction, float]] = turn
    if bulk and not tcgen05 and any(one.base == "UTMALDG" for one, _ in turn):
        path = flow.cheapest(start, done, (products, 0, draws, scalings), work.turns)
        assert path is not None  # as there is one that does more
        others = [(one, times) for block, times in path for one in flow.instructions_of(block)]
        average = [
            *((one, times / warps) for one, times in turn),
            *((one, times * (warps - 1) / warps) for one, times in others),
        ]
    outside = _outside(flow, start, work, warps, tcgen05) if work.outputs else None
    return _figures(turn, average, work, warps, is_loop, tcgen05, bulk, outside)


def _outside(flow: Flow, start: int | None, work: Work, warps: int, tcgen05: bool) -> float | None:
    """Instructions of a thread outside the main loop, for each of its sums.

    By tcgen05 other warps may multiply than those that write. What bulk copies write is known to
    their descriptors only: one for each output is asked for.
    """
    bulk = any(one.base == "UTMASTG" for one in flow.code)
    per_warp = work.rows * work.columns // warps
    stored = math.ceil(work.outputs) if bulk else int(2 * work.outputs * per_warp)
    passes = int(start is not None and not tcgen05)

    @functools.cache
    def done(block: int) -> tuple[int, ...]:
        ones = flow.instructions_of(block)
        if bulk:
            return int(passes and block == start), sum(one.base == "UTMASTG" for one in ones)
        stores = sum(pipes.cache_bytes(one) for one in ones if one.base == "STG")
        return int(passes and block == start), stores

    body = set() if start is None else flow.loops[start][0]
    path = flow.cheapest(None, done, (passes, stored), 1, free=body)
    if path is None:
        return None
    outside = (b for b, _ in path if b not in body)
    count = sum(1 for block in outside for _ in flow.instructions_of(block))
    return round(count * 32 * warps / (work.rows * work.columns), 2)


def _is_philoxs(one: Instruction) -> bool:
    """A wide product alone; an address is one with a sum."""
    wide = one.opcode.startswith(("IMAD.WIDE.U32", "IMAD.HI.U32"))
    return wide and one.operands.rstrip().endswith("RZ")


def _figures(
    turn: list[tuple[Instruction, int]],
    average: Sequence[tuple[Instruction, float]],
    work: Work,
    warps: int,
    is_loop: bool,
    tcgen05: bool,
    bulk: bool,
    outside: float | None,
) -> Hot:
    lanes = 32 * warps / (work.rows * work.columns)

    def total(figure: Callable[[Instruction], float]) -> float:
        return sum(times * figure(one) for one, times in average)

    by_pipe: defaultdict[str, float] = defaultdict(float)
    macs: defaultdict[str, float] = defaultdict(float)
    for one, times in average:
        by_pipe[pipes.pipe(one)] += times
        if one.base in _MULTIPLIES_BY:
            macs[_MULTIPLIES_BY[one.base]] += times * pipes.multiply_adds(one)
    loads = [one for one, _ in turn if one.base in ("LDG", "LDGSTS", "UTMALDG")]
    cache_bytes = total(pipes.cache_bytes) / 32 * lanes
    if bulk:
        cache_bytes += 4 * work.streamed * work.head_dim / (work.rows * work.columns)
    return Hot(
        instructions=round(total(lambda one: 1) * lanes, 2),
        shared_bytes=None if tcgen05 else round(total(pipes.shared_bytes) / 32 * lanes, 1),
        cache_bytes=round(cache_bytes, 2),
        loads=len(loads),
        late_loads=_late_loads([one for one, _ in turn], is_loop),
        waits=sum(one.opcode.startswith(_WAIT) for one, _ in turn),
        products=len(work.products),
        mma_sync=sum(times for one, times in turn if one.base == "HMMA"),
        rows=work.rows,
        columns=work.columns,
        head_dim=work.head_dim,
        pipes={name: round(count * lanes, 4) for name, count in sorted(by_pipe.items())},
        multiply_adds={kind: amount / 32 * lanes for kind, amount in macs.items()},
        outside=outside,
    )


def _late_loads(turn: list[Instruction], is_loop: bool) -> int:
    """Loads into registers that are used in their own turn with no product in between.

    A copy into shared memory is asynchronous, and what is first used in the next turn is early.
    Where there is no loop, there is no turn that could go on meanwhile.
    """
    if not is_loop:
        return 0
    late = 0
    for place, load in enumerate(turn):
        if load.base != "LDG":
            continue
        target = re.match(r"\s*(?:!?U?P\w+, )?R(\d+)", load.operands)
        if target is None:  # into RZ: a prefetch
            continue
        first = int(target[1])
        registers = range(first, first + max(1, pipes.access_bits(load.opcode) // 32))
        for one in turn[place + 1 :]:
            if pipes.is_tensor_core(one):
                break
            if _reads(one, registers):
                late += 1
                break
    return late


def _reads(one: Instruction, registers: range) -> bool:
    named = [int(number) for number in re.findall(r"\bR(\d+)", one.operands)]
    # The first operand is what is written, but for a store.
    if one.base not in ("STG", "STS", "ST", "STL", "RED", "ISETP", "FSETP", "LDGSTS"):
        named = named[1:]
    return any(number in registers for number in named)


def bound(hot: Hot, machine: pipes.Machine) -> dict[str, float]:
    """Cycles a score that each part of a multiprocessor needs at least."""
    per = {name: count / 32 for name, count in hot.pipes.items()}  # warps' instructions a score
    tensor = hot.multiply_adds.get("mma.sync", 0) / machine.mma
    if machine.wgmma:
        tensor += hot.multiply_adds.get("wgmma", 0) / machine.wgmma
    return {
        "issue": hot.instructions / 32 / machine.issue,
        "fma": (per.get("fma", 0) + per.get("imad", 0)) / machine.fma,
        "imad": per.get("imad", 0) / machine.imad,
        "alu": per.get("alu", 0) / machine.alu,
        "mufu": per.get("mufu", 0) / machine.mufu,
        "tensor": tensor,
        "shared": (hot.shared_bytes or 0) / machine.shared,
        "L2": hot.cache_bytes / machine.cache,
    }
