"""attention's main passes with and without dropout, for test_kernels.py."""

from bertfast.ops.attention import aot
from bertfast.ops.attention.config import architecture


def triton_cases(capability):
    arch = architecture(capability)
    for pass_ in ("forward", "dq", "dkv"):
        for dropout in (False, True):
            yield aot.case(pass_, "packed", "bfloat16", 64, 512, dropout, arch)
