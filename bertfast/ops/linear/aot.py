"""The kernels of a product and its GELU as `bertfast kernels` compiles and labels them.

An element is a sum of the product: those of a block's tile in one turn of the loop over the inner
dimension. What follows that loop is counted for itself (`Work.most_outside`).
"""

import re

import torch

from .. import triton_lib
from ..aot import CUDA_NAMES, Case, Launch, Work
from . import config, run

# Instructions outside the main loop for each sum. A bare product has 5.6 to 6.8, GELU adds 12 and
# its derivative with the sums for the bias's gradient 20.
MOST_OUTSIDE = {"forward": 20.0, "backward": 30.0}
# Of a gated activation the forward has one value for two sums, half of that GELU; the backward's
# derivatives are 28, and it loads, stores and sums two values for each.
MOST_OUTSIDE_GATED = {"forward": 17.0, "backward": 50.0}


# A form serves all sizes, so one of each suffices: those of a base model, and inputs that aren't a
# multiple of a step.
ROWS, INPUTS, OUTPUTS = 16384, 768, 3072


def call_launchers() -> None:
    """Everything in bfloat16; of the rest what saves u for a backward, as it has more to do."""
    _call(torch.bfloat16, INPUTS, saves=(False, True))
    _call(torch.bfloat16, INPUTS, tanh=True)
    _call(torch.float16, INPUTS)
    _call(torch.bfloat16, INPUTS + 8)
    arch = config.architecture(triton_lib.capability_without_device.get())
    for pass_ in config.PASSES:
        for other in config.candidates(arch, pass_)[1:]:
            with config.trial(pass_, other):
                _call(torch.bfloat16, INPUTS, saves=(False, True))


def _call(
    dtype: torch.dtype, inputs: int, tanh: bool = False, saves: tuple[bool, ...] = (True,)
) -> None:
    choice = run.Choice("triton", "triton", "triton")
    bias = torch.empty(OUTPUTS, dtype=dtype)
    x, up = (torch.empty(size, inputs, dtype=dtype) for size in (ROWS, OUTPUTS))
    down, u = (torch.empty(size, OUTPUTS, dtype=dtype) for size in (inputs, ROWS))
    for save in saves:
        run.forward(x, up, bias, tanh, choice, save)
    run.backward(x, down, u, bias, tanh, (True, True), choice)


_WORDS = {"gelu": "", "gelu_tanh": ", tanh", "silu": ", silu"}


def triton_case(launch: Launch) -> Case | None:
    """Of a gated activation too, whose tile in the forward has the columns of both halves."""
    if launch.name == "column_sum_kernel":
        return None  # layer_norm's is the same
    values = launch.values
    block = tuple(values[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    backward = "backward" in launch.name
    label = " x ".join(map(str, block))
    gated = values["HALVES"] == 2
    label += ", walking" * values.get("WALK", False) + ", gated" * gated
    label += _WORDS[values["ACTIVATION"]]
    saves = not backward and any(launch.has(name) for name in ("u_ptr", "u_desc") if name in values)
    label += ", u" * saves + ", K tail" * (not values.get("EVEN_K", True))
    rows, columns, depth = block
    outputs: float = 1 + saves
    if gated and backward:
        outputs = 2
    elif gated:
        columns, outputs = 2 * columns, 0.5 + saves
    most = MOST_OUTSIDE_GATED if gated else MOST_OUTSIDE
    work = Work(
        *(rows, columns, depth, ((rows, depth),)),
        streamed=(rows + columns) // 2,
        wgmma=True,
        outputs=outputs,
        most_outside=most["backward" if backward else "forward"],
    )
    matrix = values.get("a_ptr", getattr(values.get("a_desc"), "base", None))
    dtype = str(matrix.dtype).removeprefix("torch.")
    elements = rows * columns / launch.threads
    walks = values.get("WALK", False)
    return Case(label, dtype, launch.threads, elements, loop=True, again=walks, work=work)


_CUDA_STAGES, _CUDA_WARPS = 3, 4
_CUDA_OPERAND = 128 * 32  # values of an operand in a stage
# By bulk copies and wgmma: one consumer makes a tile, 128 x 128, with 64 values of the inner
# dimension in a stage. Beside the stages lie two slabs of each consumer, barriers, and sums.
_PING_PONG_SHARED = (5 * 2 + 4) * 128 * 64 * 2 + 128
_PING_PONG_SUMS = 2 * 2 * 128 * 4
# Instructions outside its main loop for each sum: what hides behind the other consumer's products.
_PING_PONG_OUTSIDE = {"forward": 16.0, "backward": 24.0}


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """The case of a template instance of csrc/kernels/linear_gelu, if it is one."""
    found = re.fullmatch(r"linear_gelu_(forward|backward)(_ping_pong)?_kernel", kernel)
    if found is None:
        return None
    pass_, dtype, tanh = found[1], CUDA_NAMES[arguments[0]], ", tanh" * (arguments[1] == "true")
    if found[2]:
        return _ping_pong(pass_, dtype, tanh)
    tile = int(arguments[2]) if pass_ == "forward" else 128
    outputs = 2 if pass_ == "forward" else 1
    return by_warps(tile, tanh, dtype, outputs, MOST_OUTSIDE[pass_])


def by_warps(tile: int, words: str, dtype: str, outputs: float, most_outside: float) -> Case:
    """Of a kernel whose blocks have `tile` x `tile` sums, by mma.sync. outputs: tensors of so many
    values that it writes."""
    depth = _CUDA_OPERAND // tile
    small = tile < 128  # too few values of a thread for what a block costs
    work = Work(
        *(tile, tile, depth, ((tile, depth),)),
        streamed=tile,
        outputs=outputs,
        most_outside=None if small else most_outside,
    )
    return Case(
        f"{tile} x {tile} x {depth}{words}",
        dtype,
        threads=32 * _CUDA_WARPS,
        elements=tile**2 / (32 * _CUDA_WARPS),
        loop=True,
        dynamic_shared=_CUDA_STAGES * 2 * 2 * _CUDA_OPERAND,
        work=work,
    )


def _ping_pong(pass_: str, dtype: str, tanh: str) -> Case:
    """Figures are those of a consumer and its tile; registers are as they are at the launch."""
    work = Work(
        *(128, 128, 64, ((128, 64),)),
        streamed=128,
        wgmma=True,
        outputs=2 if pass_ == "forward" else 1,
        most_outside=_PING_PONG_OUTSIDE[pass_],
    )
    return Case(
        f"128 x 128 x 64{tanh}",
        dtype,
        threads=128,
        elements=128,
        loop=True,
        again=True,
        capability=90,
        dynamic_shared=_PING_PONG_SHARED + _PING_PONG_SUMS * (pass_ == "backward"),
        work=work,
    )
