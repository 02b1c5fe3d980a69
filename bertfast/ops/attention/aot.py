"""attention's kernels as `bertfast kernels` compiles and labels them.

An element is a score: those of a block of queries by keys, which is one turn of the longest loop.
In the forward and in dq over a plan's tiles that is the loop for sequences' ends and for tiles of
several sequences, with its shorter steps. A kernel without a loop is counted whole. The CUDA
kernels are in aot_cuda.py.
"""

import torch

from ...packing.sequences import Sequences
from ..aot import Case, Launch, Work
from ..dropout import NO_DROPOUT, Dropout
from . import run
from .aot_cuda import cuda_case
from .scores import Scores

__all__ = ["call_launchers", "cuda_case", "triton_case"]

BATCH, HEADS = 3, 12
TOKENS = 1000  # of a packed batch; a launch specialises on multiples of 16
TILES = {"planned": 64, "planned by 32": 32}
# (layout, length of the longest sequence), with dropout; those without it, as the rest differs from
# them only by having less to do. Up to 128 tokens one kernel computes the whole backward.
LONG = [(layout, 512) for layout in ("masked", "packed", *TILES)]
FORWARD = [("masked", 128), *LONG]
BACKWARD = [*LONG, ("masked", 64), ("masked", 128), ("packed", 128)]
BACKWARD += [("planned", 64), ("planned by 32", 32)]
BACKWARD_WITHOUT_DROPOUT = [("packed", 512), ("planned", 512), ("packed", 128)]
PASSES = {"attention_fwd_kernel": "forward", "attention_bwd_dq_kernel": "dq"}
PLAIN = Scores(0.125)
FEATURES = {"cos_ptr": "rotary", "bias_ptr": "bias"}  # pointers that a kernel has, or hasn't


def call_launchers() -> None:
    """Everything in bfloat16 at head dimension 64; the others where they differ most."""
    for layout, length in FORWARD:
        for dropout in (True, False):
            call(layout, length, dropout=dropout, backward=False)
    for layout, length in BACKWARD:
        call(layout, length, forward=False)
    for layout, length in BACKWARD_WITHOUT_DROPOUT:
        call(layout, length, dropout=False, forward=False)
    for dtype, head_dim in ((torch.float16, 64), (torch.bfloat16, 32)):
        call("masked", 512, dtype, head_dim)
        call("masked", 128, dtype, head_dim, forward=False)
    for dtype, head_dim in ((torch.float32, 64), (torch.bfloat16, 96), (torch.bfloat16, 128)):
        call("masked", 512, dtype, head_dim)
    # By positions, as models have it: rotary alone or with a window, and a bias with its gradient.
    rotary = PLAIN._replace(cos=torch.empty(512, 32), sin=torch.empty(512, 32))
    local = rotary._replace(left=64, right=64)
    bias = PLAIN._replace(bias=torch.empty(HEADS, 255))
    call("planned", 512, dropout=False, forward=False, scores=rotary)
    call("planned", 512, dropout=False, scores=local)
    call("planned", 512, dropout=False, backward=False, scores=bias)
    call("planned", 512, scores=bias)
    call("packed", 64, dropout=False, forward=False, scores=rotary)
    call("packed", 128, dropout=False, forward=False, scores=local)


def call(
    layout: str,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 64,
    dropout: bool = True,
    forward: bool = True,
    backward: bool = True,
    scores: Scores = PLAIN,
) -> None:
    tokens: tuple[int, ...]
    if layout == "masked":
        tokens, sequences = (BATCH, length), Sequences(torch.empty(BATCH, length, dtype=torch.bool))
    else:
        cu, tiles = (torch.empty(n, dtype=torch.int32) for n in ((BATCH + 1,), (2 * BATCH, 3)))
        tile = TILES.get(layout, 0)
        tokens, sequences = (TOKENS,), Sequences(None, cu, length, tiles if tile else None, tile)
    heads = torch.empty(*tokens, 3, HEADS, head_dim, dtype=dtype)
    drop = Dropout(torch.empty(1, dtype=torch.int64), 6554, 1.1, 3, None) if dropout else NO_DROPOUT
    if forward:
        run.forward(heads, sequences, scores, drop, "triton", True)
    if backward:
        saved = run.new_saved(heads, layout != "masked", True)
        dout = torch.empty_like(saved.out)
        run.backward(dout, heads, saved, sequences, scores, drop, "triton", scores.bias is not None)


def triton_case(launch: Launch) -> Case | None:
    if launch.name == "rotate_kernel":
        layout = "planned" if launch.has("tiles_ptr") else "packed"
        label = f"rotate, {layout}, D {launch.values['D']}"
        elements = 2 * launch.values["BLOCK"] * launch.values["D"]  # of q and k
        return launch.case(label, "q_ptr", "q_ptr", elements, scalar_loads=4)
    if launch.name in ("attention_bwd_bias_kernel", "bias_sums_kernel"):
        return _bias_case(launch)
    values, planned, dropout = launch.values, launch.has("tiles_ptr"), launch.has("seed_ptr")
    features = [word for pointer, word in FEATURES.items() if launch.has(pointer)]
    features += ["window"] if values["LEFT"] is not None else []
    pass_ = PASSES.get(launch.name) or ("whole" if values["WHOLE"] else "dkv")
    if pass_ == "dq" and planned and not dropout and not features:
        return None  # as with dropout, but for having less to do
    layout = "packed" if launch.has("cu_ptr") else "masked"
    if planned:
        tile = values["PARTS"] * values["BLOCK_M" if launch.name in PASSES else "BLOCK_N"]
        (layout,) = (name for name, size in TILES.items() if size == tile)
    label = f"{pass_}, {layout}, D {values['D']}, up to {values['length']}"
    label = ", ".join([label, *["dropout"] * dropout, *features])
    single = values.get("SINGLE", False)
    shorter = planned and not single and "BLOCK_T" in values and values["LEFT"] is None
    scores = values["BLOCK_M"] * values["BLOCK_T" if shorter else "BLOCK_N"]
    figures = dict(loop=not single, again=planned, scalar_stores=1)
    work = None if values["q_ptr"].dtype == torch.float32 else _triton_work(launch, pass_)
    return launch.case(label, "q_ptr", "q_ptr", scores, work=work, **figures)


def _bias_case(launch: Launch) -> Case:
    """The two kernels of a bias's gradient, whose blocks are square."""
    block = launch.values["BLOCK"]
    if not launch.has("q_ptr"):
        return launch.case("bias's sums", "parts_ptr", "parts_ptr", block * block, loop=True)
    width = launch.values["BLOCK_D"]
    work = Work(
        *(block, block, width, ((block, width),) * 2),
        streamed=2 * block,
        dropout=launch.has("seed_ptr"),
        wgmma=block >= 64,
    )
    label = f"bias, D {launch.values['D']}" + ", dropout" * launch.has("seed_ptr")
    return launch.case(label, "q_ptr", "q_ptr", block * block, work=work, loop=True, again=True)


def _triton_work(launch: Launch, pass_: str) -> Work:
    """Of the loop in which every score counts, if there is such a one."""
    rows, columns, width = (launch.values[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    scores, to_queries, to_keys = (rows, width), (rows, columns), (columns, rows)
    products = {
        "forward": (scores, to_queries),
        "dq": (scores, scores, to_queries),
        "dkv": (scores, scores, to_keys, to_keys),
        "whole": (scores, scores, to_keys, to_keys, to_queries),
    }[pass_]
    by_keys = pass_ in ("forward", "dq")
    return Work(
        *(rows, columns, width, products),
        streamed=columns if by_keys else rows,
        dropout=launch.has("seed_ptr"),
        scales=pass_ == "forward" and not launch.values["SINGLE"],
        wgmma=min(least for least, _ in products) >= 64 and launch.threads >= 128,
    )
