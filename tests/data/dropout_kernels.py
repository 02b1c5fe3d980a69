"""attention's main passes with and without dropout, for test_kernels.py."""

from bertfast.ops.attention import aot

triton_case = aot.triton_case


def call_launchers():
    for dropout in (False, True):
        aot.call("packed", 512, dropout=dropout)
