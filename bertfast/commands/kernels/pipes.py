"""Costs of an instruction on a multiprocessor: a pipe's time, bytes of memory, multiply-adds.

Rates are those of the CUDA programming guide's table of throughput, of data sheets and of published
measurements; L2's is assumed. So the pipe that bounds is a reading of counts, not a measured speed.
"""

import re
from dataclasses import dataclass

from .flow import Instruction

TENSOR_CORE = re.compile(r"(?:H|I|D|Q|B|O)G?MMA|UTC\w*MMA")
# The width of a memory access is one of the instruction's modifiers; without any it is 32 bits.
ACCESS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}

_PIPES = {
    "fma": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2 HFMA",
    "imad": "IMAD IMUL IDP XMAD IMAD32I",
    "alu": (
        "IADD3 IADD LOP3 LOP SHF SHL SHR ISETP FSETP FSET SEL FSEL FMNMX FMNMX3 IMNMX VIMNMX PRMT "
        "LEA MOV PLOP3 P2R R2P IABS F2FP BMSK SGXT CS2R I2FP VOTE ISCADD LOP32I IADD32I MOV32I "
        "FCHK HSETP2 HMNMX2 VIADD VIADDMNMX VABSDIFF VHMNMX BFE BFI PSETP HSET2 DSETP"
    ),
    "mufu": "MUFU F2I I2F F2F FRND FLO POPC BREV REDUX",
    "ldsm": "LDSM",
    "shared": "LDS STS STSM ATOMS SHFL",
    "global": "LDG STG LD ST LDGSTS RED REDG ATOM ATOMG UTMALDG UTMASTG UTMAREDG UBLKCP",
    "local": "LDL STL",
}
_PIPE = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
# Of one warp: 16 x 8 x 16, 16 x 8 x 8, 8 x 8 x 4.
_HMMA = {"16816": 2048, "1688": 1024, "884": 512}
WARPGROUP = 4  # warps that multiply together


def is_tensor_core(one: Instruction) -> bool:
    return TENSOR_CORE.fullmatch(one.base) is not None


def is_tcgen05(one: Instruction) -> bool:
    return one.base.startswith("UTC") and is_tensor_core(one)


def pipe(one: Instruction) -> str:
    """The pipe's name; "other" for what only has to be issued."""
    return "tensor" if is_tensor_core(one) else _PIPE.get(one.base, "other")


def access_bits(opcode: str) -> int:
    """Of a thread's access to memory."""
    return next((ACCESS_BITS[m] for m in opcode.split(".")[1:] if m in ACCESS_BITS), 32)


def multiply_adds(one: Instruction) -> int:
    """Of a warp. 0 for tcgen05, whose shape is in its operands."""
    if one.base == "HMMA":
        shape = re.search(r"\.(16816|1688|884)\b", one.opcode)
        return _HMMA[shape[1]] if shape else 0
    if one.base == "HGMMA":
        rows, columns, depth = _wgmma_shape(one)
        return rows * columns * depth // WARPGROUP
    return 0


def _wgmma_shape(one: Instruction) -> tuple[int, int, int]:
    shape = re.search(r"\.64x(\d+)x(\d+)", one.opcode)
    if shape is None:
        raise ValueError(f"{one.opcode} has no shape")
    return 64, int(shape[1]), int(shape[2])


def shared_bytes(one: Instruction) -> int:
    """That a full warp moves through shared memory, without conflicts."""
    if one.base in ("LDSM", "STSM"):
        matrices = re.search(r"\.(\d)$", one.opcode)
        return 128 * (int(matrices[1]) if matrices else 1)
    if one.base in ("LDS", "STS", "ATOMS", "LDGSTS"):
        return 4 * access_bits(one.opcode)
    if one.base == "SHFL":
        return 128
    if one.base == "HGMMA":  # read once by the warpgroup; the left side may be in registers
        rows, columns, depth = _wgmma_shape(one)
        left = 0 if re.match(r"\s*R\d+, R\d+", one.operands) else rows
        return 2 * depth * (columns + left) // WARPGROUP
    return 0


def cache_bytes(one: Instruction) -> int:
    """That a full warp moves between registers or shared memory and the second-level cache."""
    if one.base in ("LDG", "LD", "LDGSTS", "STG", "ST"):
        return 4 * access_bits(one.opcode)
    if one.base in ("RED", "REDG", "ATOM", "ATOMG"):  # read and written
        return 8 * access_bits(one.opcode)
    return 0


@dataclass(frozen=True)
class Machine:
    """The most that a multiprocessor does in a cycle: warps' instructions, bytes, multiply-adds."""

    name: str
    multiprocessors: int
    gigahertz: float
    mma: float
    wgmma: float
    fma: float
    issue: float = 4
    imad: float = 2
    alu: float = 2
    mufu: float = 0.5
    shared: float = 128
    cache: float = 32


# 312 TFLOP/s at 1.41 GHz, and 989 at 1.83 GHz by wgmma: the data sheets. mma.sync reaches 62.5 % of
# wgmma's rate (arXiv 2402.13499: 62.9 % on average).
MACHINES = {
    80: Machine("A100", 108, 1.41, mma=1024, wgmma=0, fma=2),
    90: Machine("H100", 132, 1.755, mma=1280, wgmma=2048, fma=4),
}
