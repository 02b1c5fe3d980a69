"""A kernel's control flow, read from its machine code: blocks, loops, and the cheapest path.

Followed is what a warp does while it stays together: not the detours of `BRA.DIV`, which it takes
only where its lanes have parted.
"""

import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import TypeAlias

_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_BARRIER = re.compile(r"\bB\d+")


@dataclass
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    predicated: bool
    target: int | None = None  # index of the instruction that its operand names
    to_itself: bool = False

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]


def instructions(lines: list[str]) -> list[Instruction]:
    """Those of a kernel's lines of nvdisasm's output."""
    found, labels, targets = [], {}, []
    for line in lines:
        if match := _LINE.match(line):
            guard, opcode, operands = match.groups()
            # A guard that is always true guards nothing.
            predicated = guard not in (None, "@PT", "@UPT")
            # Since Volta a branch may also carry its condition as an operand: BRA P0, `(.L_x_1)
            if opcode.startswith("BRA"):
                predicated |= bool(re.match(r"\s*!?U?P\d", operands))
            found.append(Instruction(opcode, operands, predicated))
            target = _TARGET.search(operands)
            targets.append(target[1] if target else None)
        elif match := _LABEL.match(line):
            labels[match[1]] = len(found)
    for index, (instruction, label) in enumerate(zip(found, targets, strict=True)):
        instruction.target = labels.get(label)
        instruction.to_itself = instruction.target == index
    return found


# Blocks, in their order, and how often a turn runs each.
Path: TypeAlias = list[tuple[int, int]]
Work: TypeAlias = tuple[int, ...]


class Flow:
    """Blocks of instructions, where each leads, and the loops among them."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        self._find_blocks()
        self._find_order()
        self._find_loops()

    def instructions_of(self, block: int) -> Iterator[Instruction]:
        first, last = self.blocks[block]
        return (one for one in self.code[first : last + 1] if one.opcode != "NOP")

    def _find_blocks(self) -> None:
        code, after = self.code, self._successors()
        reached: set[int] = set()
        waiting = [0] if code else []
        while waiting:
            index = waiting.pop()
            if index not in reached:
                reached.add(index)
                waiting += after[index]
        leaves = {index for index in reached if code[index].base in ("EXIT", "RET")}
        parts = leaves | {index for index in reached if after[index] != [index + 1]}
        starts = {0} | {to for index in parts for to in (index + 1, *after[index])}
        starts &= reached
        self.blocks: list[tuple[int, int]] = []
        for first in sorted(starts):
            last = first
            while after[last] == [last + 1] and last + 1 not in starts:
                last += 1
            self.blocks.append((first, last))
        self.exits = {block for block, (_, last) in enumerate(self.blocks) if last in leaves}
        place = {first: block for block, (first, _) in enumerate(self.blocks)}
        self.after = [[place[to] for to in after[last]] for _, last in self.blocks]
        self.before: list[list[int]] = [[] for _ in self.blocks]
        for block, leads in enumerate(self.after):
            for to in leads:
                self.before[to].append(block)

    def _successors(self) -> list[list[int]]:
        """The successors of each instruction."""
        code = self.code
        # BSSY names where the lanes come together again, BSYNC goes there.
        meetings: dict[str, set[int]] = {}
        for one in code:
            barrier = _BARRIER.search(one.operands)
            if one.base == "BSSY" and barrier and one.target is not None:
                meetings.setdefault(barrier[0], set()).add(one.target)
        result = []
        for index, one in enumerate(code):
            following = [index + 1] if index + 1 < len(code) else []
            there = [] if one.target is None or one.to_itself else [one.target]
            leads = following
            if one.base == "BRA":
                if ".DIV" not in one.opcode and ".CONV" not in one.opcode:
                    leads = (following if one.predicated else []) + there
            elif one.base == "CALL" and there and not self._returns(there[0]):
                leads = (following if one.predicated else []) + there  # a far branch
            elif one.base in ("EXIT", "RET"):
                leads = following if one.predicated else []
            elif one.base in ("BRX", "JMX", "BRXU"):
                leads = []
            elif one.base == "BSYNC":
                barrier = _BARRIER.search(one.operands)
                places = meetings.get(barrier[0], set()) if barrier else set()
                if places and index + 1 not in places:
                    leads = sorted(place for place in places if place > index)[:1] or following
            result.append(list(dict.fromkeys(leads)))
        self._lead_jumps(result)
        return result

    def _lead_jumps(self, after: list[list[int]]) -> None:
        """Has a jump through a table, which the text doesn't show, lead to all code that nothing
        else leads to: where warps do different work, that is each part of it."""
        jumps = [index for index, one in enumerate(self.code) if one.base in ("BRX", "JMX", "BRXU")]
        reached: set[int] = set()
        waiting = [0]
        for first in range(1, len(self.code) if jumps else 0):
            while waiting:
                index = waiting.pop()
                if index not in reached:
                    reached.add(index)
                    waiting += after[index]
            one = self.code[first]
            if first not in reached and one.opcode != "NOP" and not one.to_itself:
                for jump in jumps:
                    after[jump].append(first)
                waiting.append(first)

    def _returns(self, index: int) -> bool:
        """True if a function begins here: it comes to a RET before anything else."""
        while index < len(self.code):
            one = self.code[index]
            if one.base == "RET":
                return True
            if one.base == "EXIT" and not one.predicated:
                return False
            if one.base == "BRA" and not one.predicated:
                if one.target is None or one.target <= index:
                    return False
                index = one.target
            else:
                index += 1
        return False

    def _find_order(self) -> None:
        """Blocks in reverse postorder, and what dominates each at once."""
        finished: list[int] = []
        seen = {0}
        stack = [(0, iter(self.after[0]))] if self.blocks else []
        while stack:
            block, leads = stack[-1]
            to = next((to for to in leads if to not in seen), None)
            if to is None:
                finished.append(block)
                stack.pop()
            else:
                seen.add(to)
                stack.append((to, iter(self.after[to])))
        self.order = finished[::-1]
        self.rank = {block: rank for rank, block in enumerate(self.order)}
        self._dominator = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                known = [one for one in self.before[block] if one in self._dominator]
                new = known[0]
                for other in known[1:]:
                    new = self._common(new, other)
                changed |= self._dominator.get(block) != new
                self._dominator[block] = new

    def _common(self, one: int, other: int) -> int:
        while one != other:
            if self.rank[one] < self.rank[other]:
                one, other = other, one
            one = self._dominator[one]
        return one

    def _find_loops(self) -> None:
        """Each loop by its first block: the blocks in it, and those that lead back."""
        self.loops: dict[int, tuple[set[int], set[int]]] = {}
        for block, leads in enumerate(self.after):
            for to in leads:
                if self._common(block, to) == to:
                    body, ends = self.loops.setdefault(to, ({to}, set()))
                    ends.add(block)
        for body, ends in self.loops.values():
            waiting = list(ends)
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += self.before[block]

    def in_loops(self) -> set[int]:
        """The blocks that are in any loop."""
        return set().union(*(body for body, _ in self.loops.values()))

    def cheapest(
        self,
        start: int | None,
        work: Callable[[int], Work],
        wanted: Work,
        turns: int,
        free: Container[int] = (),
    ) -> Path | None:
        """The path of the fewest instructions on which the blocks' work adds up to what is wanted:
        the first part exactly, of each other part at least as much.

        start: a loop's first block, for one turn of it; or None, for all from entry to an EXIT.
        turns: those of a loop inside that has work of the first kind, for one around it.
        free: blocks whose instructions aren't counted.
        """
        if start is None:
            start, body = 0, set(self.order)
            ends = self.exits
        else:
            body, ends = self.loops[start]
        times = dict.fromkeys(body, 1)
        for first, (inside, _) in self.loops.items():
            if first != start and inside < body and any(work(block)[0] for block in inside):
                times |= {block: times[block] * turns for block in inside}

        def add(done: Work, block: int) -> Work:
            more = (times[block] * part for part in work(block))
            sums = [a + b for a, b in zip(done, more, strict=True)]
            return (sums[0], *map(min, sums[1:], wanted[1:]))

        def cost(block: int) -> int:
            if block in free:
                return 0
            return times[block] * sum(1 for _ in self.instructions_of(block))

        # Of each block and sum of work: the fewest instructions so far, and the step before.
        none: Work = (0,) * len(wanted)
        best: dict[int, dict[Work, tuple[int, tuple[int, Work] | None]]]
        best = {block: {} for block in body}
        best[start][add(none, start)] = (cost(start), None)
        for block in sorted(body, key=self.rank.__getitem__):
            for to in self.after[block]:
                if to not in body or self.rank[to] <= self.rank[block]:
                    continue
                price = cost(to)
                for done, (spent, _) in best[block].items():
                    sums, total = add(done, to), spent + price
                    known = best[to].get(sums)
                    if sums[0] <= wanted[0] and (known is None or total < known[0]):
                        best[to][sums] = (total, (block, done))
        ends = {block for block in ends if wanted in best[block]}
        if not ends:
            return None
        step: tuple[int, Work] | None = (min(ends, key=lambda end: best[end][wanted][0]), wanted)
        path = []
        while step is not None:
            block, sums = step
            path.append((block, times[block]))
            step = best[block][sums][1]
        return path[::-1]
