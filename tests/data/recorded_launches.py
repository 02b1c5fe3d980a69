"""Recorded launches, as JSON, for test_kernels.py: where the interpreter is on, Triton
specialises nothing."""

import json
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from bertfast.commands.kernels import DEFAULT_ARCHS
from bertfast.commands.kernels.compiling import forms
from bertfast.commands.kernels.recording import aim_at, record
from bertfast.commands.kernels.rows import aot_modules
from bertfast.commands.kernels.sass import capability
from bertfast.ops.aot import Case


@triton.jit(do_not_specialize=["never"])
def many_kernel(
    even_ptr, odd_ptr, absent_ptr, one, sixteen, seven, wide, never, scale, N: tl.constexpr
):
    pass


def launch_many():
    x = torch.empty(64, dtype=torch.float16)
    numbers = dict(one=1, sixteen=16, seven=7, wide=2**40, never=16, scale=1.0)
    many_kernel[(1,)](x, x[1:], None, **numbers, N=96, num_warps=2, num_stages=5)


@triton.jit
def copy_kernel(x_ptr, n, y_ptr):
    pass


def faults(*calls):
    """Complaints of `forms` about a module with such launchers, and how many forms it finds."""

    def call_launchers():
        x = torch.empty(4)
        for arguments, options in calls:
            copy_kernel[(1,)](x, *arguments, **options)

    cases = {"copy_kernel": Case("copy", "float32", 32, None)}
    module = SimpleNamespace(
        __name__="copying",
        call_launchers=call_launchers,
        triton_case=lambda launch: cases[launch.name],
    )
    said = []
    return [len(list(forms(module, said.append))), *said]


def specializations(module, device):
    found = []
    record(module.call_launchers, found.append, device)
    return [launch.specialization for launch in found]


def main():
    modules = list(aot_modules().values())
    found, said = {}, []
    for arch in DEFAULT_ARCHS:
        aim_at(capability(arch))
        pairs = [pair for module in modules for pair in forms(module, said.append)]
        found[arch] = [(launch.name, case.label, case.dtypes) for launch, case in pairs]
    many = []
    record(launch_many, many.append)
    y = torch.empty(4, device="meta")
    result = {
        "forms": found,
        "said": said,
        "many": [json.loads(launch.specialization) for launch in many],
        "with memory": [specializations(module, "cpu") for module in modules],
        "without": [specializations(module, "meta") for module in modules],
        "right": faults(((7, y), {}), ((9, y), {})),
        "argument missing": faults(((7, y), {}), ((7,), {})),
        "unknown option": faults(((7, y), {"warps": 4})),
        "two in one": faults(((7, y), {}), ((16, y), {})),
    }
    print(json.dumps(result))


main()
