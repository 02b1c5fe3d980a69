"""How many blocks of a kernel fit on a multiprocessor at once."""

from .rows import Row
from .sass import capability

# Of a multiprocessor: threads, and kilobytes of shared memory.
_CAPACITY = {80: (2048, 164), 86: (1536, 100), 89: (1536, 100), 90: (2048, 228), 100: (2048, 228)}
_CAPACITY |= {103: (2048, 228), 120: (1536, 100), 121: (1536, 100)}
_REGISTERS = 65536
CAPABILITIES = tuple(_CAPACITY)


def blocks_per_multiprocessor(row: Row) -> int:
    """By their registers, shared memory and threads."""
    threads, kilobytes = _CAPACITY.get(capability(row.arch), (1536, 100))
    warps = -(-row.threads // 32)
    registers_per_warp = -(-row.registers * 32 // 256) * 256
    by_registers = _REGISTERS // (registers_per_warp * warps)
    # Each block costs a kilobyte more than it asks for.
    by_shared = kilobytes * 1024 // (row.shared + 1024)
    return min(by_registers, by_shared, threads // row.threads)
