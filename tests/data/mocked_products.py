"""Launches of linear_gelu and linear_gated by the mock driver, as JSON for
test_linear_gelu_launches.py."""

import json
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton.compiler
from support.mock_driver import mocked

from bertfast.ops import triton_launch
from bertfast.ops.linear import config, run
from bertfast.ops.linear_gated import run as gated

BF16 = torch.bfloat16
BY_TRITON = run.Choice("triton", "triton", "triton")
WIDTHS = ((768, 3072), (1024, 4096))
BATCHES = 100


def call(rows: int, inputs: int = 768, outputs: int = 3072, passes: str = "fsb") -> None:
    """The forward, the one that saves u, and the backward."""
    x, up = torch.zeros(rows, inputs, dtype=BF16), torch.zeros(outputs, inputs, dtype=BF16)
    bias = torch.zeros(outputs, dtype=BF16)
    if "f" in passes:
        run.forward(x, up, bias, False, BY_TRITON, False)
    if "s" in passes:
        run.forward(x, up, bias, False, BY_TRITON, True)
    if "b" in passes:
        u = torch.zeros(rows, outputs, dtype=BF16)
        run.backward(x, up.t().contiguous(), u, bias, False, (True, True), BY_TRITON)


def variants(capability: int, passes: str) -> list[str]:
    """Kernels, one for each form, that a hundred batches of two models compile."""
    torch.manual_seed(0)
    with mocked(capability, compiling=False) as driver:
        for number, rows in enumerate(torch.randint(1, 3000, (BATCHES,)).tolist()):
            call(rows, *WIDTHS[number % 2], passes)
        for rows in (1, 16, 128):
            call(rows, *WIDTHS[0], passes)
        return sorted(each.name for each in driver.compiled)


def call_gated(rows: int, inputs: int, width: int, saves: tuple[bool, ...] = (False, True)) -> None:
    """linear_gated's forwards, without u and with it, and its backward."""
    x, up = (torch.zeros(size, inputs, dtype=BF16) for size in (rows, 2 * width))
    u, bias = torch.zeros(rows, 2 * width, dtype=BF16), torch.zeros(2 * width, dtype=BF16)
    down = torch.zeros(inputs, width, dtype=BF16)
    for save in saves:
        gated.forward(x, up, bias, "gelu", BY_TRITON, save)
    gated.backward(x, down, u, bias, "gelu", True, BY_TRITON)


def gated_variants(capability: int) -> dict:
    """The kernels of linear_gated that a hundred batches of two models compile, and launches."""
    torch.manual_seed(0)
    with mocked(capability, compiling=False) as driver:
        for number, rows in enumerate(torch.randint(1, 3000, (BATCHES,)).tolist()):
            call_gated(rows, *((768, 1152), (1024, 2624))[number % 2])
        names = sorted(each.name for each in driver.compiled)
        return dict(names=names, launches=len(driver.started))


def gated_maps() -> int:
    """Tensor maps that Triton makes of linear_gated's descriptors, on sm_90."""
    with mocked(90) as driver:
        call_gated(300, 768, 1152, saves=(True,))
        return len(driver.described)


def compiled(capability: int) -> dict:
    """By the real compiler."""
    with mocked(capability) as driver:
        for rows in (300, 301):
            call(rows)
        kernels = [(kernel.name, kernel.metadata) for kernel in triton_launch.compiled()]
        return dict(
            names=sorted(each.name for each in driver.compiled),
            launches=len(driver.started),
            described=len(driver.described),
            sizes=[
                [name, meta.num_warps, meta.shared, meta.global_scratch_size]
                for name, meta in kernels
                if name.startswith("linear")
            ],
        )


def captured(capability: int) -> dict:
    """Kernels that a capture compiles and loads, after a call of other rows, and its error at a
    call of another form."""
    with mocked(capability, compiling=False) as driver:
        call(300, passes="f")
        driver.capturing = True
        call(301, passes="f")
        error = None
        try:
            call(300, passes="s")
        except RuntimeError as raised:
            error = str(raised)
        return dict(inside=driver.inside_a_capture(), error=error, launches=len(driver.started))


def unfit() -> dict:
    """Errors of kernels that can't run as they were compiled; and of one that can, none."""

    def said() -> str | None:
        try:
            call(300, passes="f")
        except triton_launch.Unfit as error:
            return str(error)
        return None

    found = {}
    with mocked(90, compiling=False) as driver:
        found["fits"] = said()
    with mocked(90, compiling=False) as driver:
        driver.loads = (255, 24, 1024)
        found["spills"] = said()
    with mocked(90, compiling=False) as driver:
        driver.loads = (255, 0, 64)
        found["threads"] = said()
    failure = RuntimeError("PassManager::run failed")
    with mocked(90), mock.patch.object(triton.compiler, "compile", side_effect=failure):
        found["compiler"] = said()
    with mocked(90) as driver:
        driver.shared_memory = 64 * 1024
        found["shared memory"] = said()
    return found


def trials() -> list[list[str]]:
    """The kernels' blocks with each candidate of a pass."""
    found = []
    for chosen in config.candidates(90, "backward"):
        with mocked(90, compiling=False) as driver, config.trial("backward", chosen):
            call(300, passes="b")
            found.append([each.name for each in driver.compiled])
    return found


def main() -> None:
    torch.set_num_threads(1)
    capabilities = (80, 90)
    result = {
        "variants": {
            arch: {passes: variants(arch, passes) for passes in ("f", "fs", "b")}
            for arch in capabilities
        },
        "gated": {arch: gated_variants(arch) for arch in capabilities},
        "gated maps": gated_maps(),
        "compiled": {arch: compiled(arch) for arch in capabilities},
        "captured": {arch: captured(arch) for arch in capabilities},
        "unfit": unfit(),
        "trials": trials(),
    }
    print(json.dumps(result))


main()
