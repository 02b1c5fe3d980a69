"""layer_norm's kernels as `bertfast kernels` compiles and labels them."""

from collections.abc import Callable
from functools import partial

import torch

from ..aot import CUDA_NAMES, DTYPES, MIXED, Case, Launch, dtypes
from ..dropout import NO_DROPOUT, Dropout
from . import run

WIDTHS = (384, 768, 1024, 4096)
# Of x narrower than the rest, with and without a copy in its dtype; and of the further forms.
MIXED_WIDTH = 768
ROWS = 1000  # in 63 partial sums; a launch specialises on multiples of 16


def call_launchers() -> None:
    for width in WIDTHS:
        for forms in DTYPES + [MIXED] * (width == MIXED_WIDTH):
            _call(width, *forms)


def _call(width: int, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    row = partial(torch.empty, width, dtype=dtype)
    rows = partial(torch.empty, (ROWS, width), dtype=dtype)
    x, norm = rows(dtype=x_dtype), run.Norm(row(), row(), 1e-12)
    seed, numbers = (torch.empty(n, dtype=torch.int64) for n in (1, ROWS))
    drop = Dropout(seed, 6554, 1.1, 3, numbers)
    run.forward(x, norm, None, None, NO_DROPOUT, "triton", run.Kept(True))
    for copy in {False, x_dtype != dtype}:
        for dropout, save in ((NO_DROPOUT, False), (NO_DROPOUT, True), (drop, True)):
            run.forward(x, norm, row(), rows(), dropout, "triton", run.Kept(save, copy=copy))
    for dropout in (NO_DROPOUT, drop):
        # Without dropout and with one dtype dx is dz.
        dx = x_dtype if dropout.threshold or x_dtype != dtype else None
        saved = run.Saved(rows(), torch.empty(ROWS), torch.empty(ROWS))
        wanted = run.Wanted(True, dx, True, True)
        run.backward(rows(), None, saved, norm.weight, dropout, wanted, "triton")
    if width == MIXED_WIDTH and dtype == torch.bfloat16:
        _call_further(rows, norm, drop)


def _call_further(rows: Callable[[], torch.Tensor], norm: run.Norm, drop: Dropout) -> None:
    """As pre-norm layers in training do, with and without a bias, and with RMSNorm."""
    x, keeps, row = rows(), run.Kept(True, sum=True), norm.weight
    for further in (norm, norm._replace(bias=None), run.Norm(row, None, 1e-6, rms=True)):
        run.forward(x, further, row, rows(), drop, "triton", keeps)
        mean = None if further.rms else torch.empty(ROWS)
        saved = run.Saved(rows(), mean, torch.empty(ROWS))
        wanted = run.Wanted(True, x.dtype, True, True, further.bias is not None)
        run.backward(rows(), rows(), saved, row, drop, wanted, "triton")
    run.forward(x, None, row, rows(), drop, "triton", run.Kept(True))
    wanted = run.Wanted(False, x.dtype, False, True)
    run.backward(rows(), None, run.NOTHING_SAVED, None, drop, wanted, "triton")


def triton_case(launch: Launch) -> Case:
    if launch.name == "column_sum_kernel":
        tile = launch.values["BLOCK_P"], launch.values["BLOCK_N"]
        label = "{} x {}".format(*tile)
        return launch.case(label, "out0_ptr", "out0_ptr", tile[0] * tile[1], loop=True)
    width, dropout = launch.values["N"], launch.has("seed_ptr")
    if launch.name == "layer_norm_bwd_kernel":
        label = f"{width}" + ", dropout" * dropout + _norm(launch, rms=not launch.has("mean_ptr"))
        label += ", sum" * launch.has("dsum_ptr")
        x, loads = "dx_ptr" if launch.has("dx_ptr") else "dz_ptr", 4 if dropout else 2
        elements = width * launch.values["ROWS"]
        return launch.case(label, x, "dy_ptr", elements, loop=True, scalar_loads=loads)
    saves = launch.has("rstd_ptr")
    form = "plain" if not launch.has("residual_ptr") else "training" if saves else "inference"
    label = f"{width}, {form}" + ", dropout" * dropout + ", copy" * launch.has("copy_ptr")
    label += _norm(launch, rms=launch.values["RMS"])
    scalars = dict(scalar_loads=2 * dropout, scalar_stores=2 * saves)
    return launch.case(label, "x_ptr", "y_ptr", width, **scalars)


def _norm(launch: Launch, rms: bool) -> str:
    """The norm of a launch, in words, if it isn't LayerNorm with a bias."""
    if not launch.has("weight_ptr"):
        return ", no norm"
    bias = launch.has("dbias_ptr" if launch.name == "layer_norm_bwd_kernel" else "bias_ptr")
    return ", rms" if rms else "" if bias else ", no bias"


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """The case of a template instance of csrc/kernels/layer_norm.cu or column_sum.cu, or None."""
    if kernel == "column_sum_kernel":
        vec, at_once = int(arguments[1]), 8
        label = f"16 columns, vec {vec}"
        row = (label, CUDA_NAMES[arguments[0]], 256, vec * at_once)
        return Case(*row, loop=True, dynamic_shared=512)
    if kernel not in ("layer_norm_forward_kernel", "layer_norm_backward_kernel"):
        return None
    forward = kernel == "layer_norm_forward_kernel"
    x, rest = (CUDA_NAMES[name] for name in arguments[:2])
    split = arguments[2][len("Split<") : -1].split(", ")
    vec, per_thread, row_threads = map(int, split[:3])
    full, dropout = split[3] == "true", arguments[3] == "true"
    threads = int(split[4])
    label = f"vec {vec} x {per_thread} x {row_threads} threads"
    if full:  # a width's own kernels; the others serve many widths, with and without dropout
        label = f"{vec * per_thread * row_threads}: {label}" + ", dropout" * dropout
    label += ", copy" * (forward and x != rest)
    label += ", further forms" * (arguments[-1] == "true")
    reduce_bytes = 2 * threads // 32 * 4 if row_threads > 32 else 0
    vectors, halves = per_thread * row_threads, max(1, vec // 4)  # PartialSlots in the source
    slots = halves * (vectors + 4 * (halves > 1))
    partial_bytes = 0 if forward else threads // row_threads * slots * 4 * vec // halves
    return Case(
        label,
        dtypes(x, rest),
        threads,
        elements=vec * per_thread,
        loop=not forward,
        scalar_loads=2 * dropout + 2 * (not forward),
        scalar_stores=2 * forward,
        dynamic_shared=max(reduce_bytes, partial_bytes),
    )
