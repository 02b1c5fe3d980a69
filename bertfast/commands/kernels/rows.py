"""A row of the table: one kernel in one form, compiled for one architecture."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType

from ... import ops
from ...ops.aot import Case
from . import hot as hot_paths
from .hot import Hot
from .sass import Code, Resources, capability


@dataclass(frozen=True)
class Row:
    source: str  # "triton" or "cuda"
    op: str
    kernel: str
    label: str
    dtypes: str
    arch: str
    threads: int
    registers: int
    stack: int
    shared: int  # bytes a block, static and dynamic
    instructions: int  # of the whole kernel
    instructions_per_element: float | None  # of the loop's body, where the kernel has a main loop
    load_bits: int | None  # the narrowest load of row data
    store_bits: int | None
    loads: dict[int, int]
    stores: dict[int, int]
    shared_accesses: int
    barriers: int
    tensor_core: int
    mufu: int
    mma_sync: int = 0  # of the tensor cores' instructions
    mma_async: int = 0  # wgmma
    late_loads: int = 0  # behind the first exponential, where none should be
    local_in_loops: int = 0  # accesses to a thread's own memory
    before_wait: int = 0  # global accesses before it has waited for earlier kernels
    multiplies: bool = False  # whether there must be a hot path
    wgmma: bool = False  # whether it must multiply by wgmma
    most_outside: float | None = None  # instructions outside its main loop that it may have
    hot: Hot | None = None
    compiler_said: list[str] = field(default_factory=list)  # warnings, by ptxas

    @property
    def form(self) -> tuple[str, str, str, str]:
        return self.source, self.kernel, self.label, self.dtypes

    def as_dict(self) -> dict:
        return asdict(self)


def make_row(
    source: str,
    op: str,
    kernel: str,
    arch: str,
    case: Case,
    code: Code,
    resources: Resources,
    dynamic_shared: int,
    compiler_said: Sequence[str] = (),
) -> Row:
    # A kernel that should have a loop and has none was unrolled altogether: all of it counts.
    body = code.loop if case.again and code.loop is not None else code
    counted = body.loop if case.loop and body.loop is not None else body
    per_element = None
    if case.elements is not None:
        per_element = round(counted.instructions / case.elements, 2)
    hot = None
    if case.work is not None and code.flow is not None:
        hot = hot_paths.find(code.flow, case.work, case.threads, case.loop)
    return Row(
        source=source,
        op=op,
        kernel=kernel,
        label=case.label,
        dtypes=case.dtypes,
        arch=arch,
        threads=case.threads,
        registers=resources.registers,
        stack=resources.stack,
        shared=resources.static_shared + dynamic_shared,
        instructions=code.instructions,
        instructions_per_element=per_element,
        load_bits=narrowest(counted.loads, case.scalar_loads),
        store_bits=narrowest(counted.stores, case.scalar_stores),
        loads=counted.loads,
        stores=counted.stores,
        shared_accesses=code.shared_accesses,
        barriers=code.barriers,
        tensor_core=code.tensor_core,
        mufu=code.mufu,
        mma_sync=code.mma_sync,
        mma_async=code.mma_async,
        late_loads=counted.late_loads if case.loads_first else 0,
        local_in_loops=code.local_in_loops,
        before_wait=code.before_wait,
        multiplies=case.work is not None,
        wgmma=case.work is not None and case.work.wgmma and capability(arch) == 90,
        most_outside=None if case.work is None else case.work.most_outside,
        hot=hot,
        compiler_said=list(compiler_said),
    )


def narrowest(accesses: dict[int, int], scalars: int) -> int | None:
    """The narrowest access, in bits, apart from the `scalars` narrowest ones."""
    for bits in sorted(accesses):
        scalars -= accesses[bits]
        if scalars < 0:
            return bits
    return None


def aot_names() -> dict[str, str]:
    """The ops that describe their kernels: op -> the module, which imports Triton."""
    names = {
        info.name: f"{ops.__name__}.{info.name}.aot"
        for info in pkgutil.iter_modules(ops.__path__)
        if info.ispkg
    }
    return {op: name for op, name in names.items() if importlib.util.find_spec(name) is not None}


def aot_modules() -> dict[str, ModuleType]:
    return {op: importlib.import_module(name) for op, name in aot_names().items()}
