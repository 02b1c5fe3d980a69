"""Reads what the compiler made of a kernel: its machine code and its resources, from a cubin.

Disassembling needs no GPU. The tools (cuobjdump, nvdisasm) come with Triton and with the CUDA
toolkit.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .flow import Flow, Instruction, instructions
from .pipes import TENSOR_CORE, access_bits


@dataclass
class Code:
    """A kernel's machine code in figures.

    Counted are the instructions that a warp can reach while it stays together: not the padding, and
    not the detours of `BRA.DIV`, which a warp takes only where its lanes have parted.
    """

    instructions: int = 0
    loads: dict[int, int] = field(default_factory=dict)  # bits of a global load -> how many
    stores: dict[int, int] = field(default_factory=dict)
    shared_accesses: int = 0
    barriers: int = 0
    tensor_core: int = 0
    mma_sync: int = 0  # of those
    mma_async: int = 0
    mufu: int = 0
    late_loads: int = 0  # global loads that stand behind the first exponential
    loop: "Code | None" = None  # the same of the main loop, if there is one; and of the one in it
    flow: Flow | None = None  # of a kernel with tensor cores or accesses to a thread's own memory
    local_in_loops: int = 0  # accesses to a thread's own memory
    # Global accesses that a kernel can come to before it has waited for earlier ones, if it waits.
    before_wait: int = 0


@dataclass
class Resources:
    registers: int
    stack: int  # bytes a thread; what the registers could not hold
    static_shared: int  # bytes a block


_WAIT = "ACQBULK"  # griddepcontrol.wait
_GLOBAL = {
    "LDG",
    "STG",
    "LDGSTS",
    "LD",
    "ST",
    "ATOM",
    "ATOMG",
    "RED",
    "UTMALDG",
    "UTMASTG",
    "UBLKCP",
}


def parse(text: str) -> dict[str, Code]:
    """The kernels of nvdisasm's output, by their (mangled) names."""
    found: dict[str, Code] = {}
    name: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(".text."):
            name, lines = line[len(".text.") : -1], []
        elif line.startswith("//---") and name:
            found[name] = _measure(instructions(lines))
            name = None
        elif name:
            lines.append(line)
    if name:
        found[name] = _measure(instructions(lines))
    return found


def _reachable(code: list[Instruction], until: str = "") -> list[int]:
    """The indices that execution can come to, without following `BRA.DIV`; until: an instruction
    that it doesn't go beyond."""
    seen: set[int] = set()
    waiting = [0]
    while waiting:
        index = waiting.pop()
        while index < len(code) and index not in seen:
            seen.add(index)
            here = code[index]
            base = here.opcode.split(".")[0]
            if base == until:
                break
            if base in ("BRX", "JMX"):  # a jump through a table: it may lead anywhere
                return list(range(len(code)))
            if here.target is not None and not here.opcode.startswith("BRA.DIV"):
                waiting.append(here.target)
            if base in ("EXIT", "BRA", "RET") and not here.predicated and ".DIV" not in here.opcode:
                break
            index += 1
    return sorted(seen)


def _measure(code: list[Instruction]) -> Code:
    reached = [i for i in _reachable(code) if code[i].opcode != "NOP" and not code[i].to_itself]
    ends: dict[int, int] = {}  # of each loop, by its start: where the last branch back to it is
    for end in reached:
        start = code[end].target
        if start is not None and start < end and code[end].opcode.startswith("BRA"):
            ends[start] = end

    def count(first: int, last: int) -> Code:
        result = _count([code[i].opcode for i in reached if first <= i <= last])
        inner = [
            count(start, end)
            for start, end in ends.items()
            if first <= start and end <= last and (start, end) != (first, last)
        ]
        # The longest one is the main loop; where there are tensor-core instructions, that has some.
        if inner:
            result.loop = max(inner, key=lambda loop: (loop.tensor_core > 0, loop.instructions))
        return result

    bases = {one.base for one in code}
    local = not bases.isdisjoint(("LDL", "STL"))
    flow = None
    if local or any(map(TENSOR_CORE.fullmatch, bases)):  # of no use for others, which are many
        flow = Flow(code)
        # A wait that stands apart branches back into the middle of the loop that it left.
        heads = {flow.blocks[block][0] for block in flow.loops}
        ends = {start: end for start, end in ends.items() if start in heads}
    result = count(0, len(code))
    result.flow = flow
    if _WAIT in bases:
        first = _reachable(code, until=_WAIT)
        result.before_wait = sum(code[i].base in _GLOBAL for i in first)
    if result.flow and local:
        blocks = result.flow.in_loops()
        inside = (one for block in blocks for one in result.flow.instructions_of(block))
        result.local_in_loops = sum(one.base in ("LDL", "STL") for one in inside)
    return result


def _count(opcodes: list[str]) -> Code:
    result = Code(instructions=len(opcodes))
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    exponentials = 0
    for opcode in opcodes:
        base = opcode.split(".", 1)[0]
        if base in ("LDG", "LDGSTS", "STG"):
            (stores if base == "STG" else loads)[access_bits(opcode)] += 1
            result.late_loads += base != "STG" and exponentials > 0
        elif base in ("LDS", "STS", "LDSM", "STSM"):
            result.shared_accesses += 1
        elif base == "BAR":
            result.barriers += 1
        elif base == "MUFU":
            result.mufu += 1
            exponentials += opcode.startswith("MUFU.EX2")
        elif TENSOR_CORE.fullmatch(base):
            result.tensor_core += 1
            result.mma_sync += base == "HMMA"
            result.mma_async += base == "HGMMA"
    result.loads, result.stores = dict(sorted(loads.items())), dict(sorted(stores.items()))
    return result


_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
# From Hopper on the driver keeps a kilobyte of shared memory for itself, which the tool includes.
_RESERVED_SHARED = 1024


def parse_resources(text: str, arch: str) -> dict[str, Resources]:
    """`cuobjdump --dump-resource-usage`'s output, by kernel."""
    reserved = _RESERVED_SHARED if capability(arch) >= 90 else 0
    return {
        name: Resources(int(registers), int(stack), max(0, int(shared) - reserved))
        for name, registers, stack, shared in _RESOURCES.findall(text)
    }


def capability(arch: str) -> int:
    """sm_90a -> 90."""
    return int(re.sub(r"\D", "", arch))


class MissingTool(Exception):
    """A tool that this machine lacks; the text says which, and where it comes from."""


def tool(name: str) -> str:
    """The path of cuobjdump, nvdisasm or nvcc."""
    places = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        places.insert(0, str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    path = os.pathsep.join([*places, os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise MissingTool(f"{name} was found neither in Triton nor in a CUDA toolkit")
    return found


def run_tool(
    name: str, *arguments: str, cwd: Path | None = None, hear: Callable[[str], object] = len
) -> str:
    """Its output. hear: called with its complaints, where it succeeds all the same."""
    result = subprocess.run(
        [tool(name), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed: {result.stderr.strip()[-500:]}")
    hear(result.stderr)
    return result.stdout


def disassemble(cubin: Path) -> str:
    # Without the data-flow analysis, whose annotations are not read.
    return run_tool("nvdisasm", "--print-code", "--no-dataflow", str(cubin))


def read_cubin(
    cubin: Path, arch: str, disassemble: Callable[[Path], str] = disassemble
) -> dict[str, tuple[Code, Resources]]:
    """The kernels of a cubin, by their (mangled) names."""
    resources = parse_resources(run_tool("cuobjdump", "--dump-resource-usage", str(cubin)), arch)
    code = parse(disassemble(cubin)) if resources else {}
    return {name: (code[name], used) for name, used in resources.items()}
