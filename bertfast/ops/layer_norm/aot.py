"""layer_norm's kernels as `bertfast kernels` compiles and labels them."""

from collections.abc import Iterator

from ..aot import Case, TritonCase

# Of x and of everything else.
DTYPES = {
    "float32": ("fp32", "fp32"),
    "float16": ("fp16", "fp16"),
    "bfloat16": ("bf16", "bf16"),
    "bfloat16->float32": ("bf16", "fp32"),
}
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
WIDTHS = (384, 768, 1024, 4096)
MIXED_WIDTH = 768  # of x narrower than the rest
# Label -> which of the optional arguments are there.
FORWARD = {
    "training": {"x_bias", "residual", "z", "stats"},
    "training, dropout": {"x_bias", "residual", "z", "stats", "dropout"},
    "inference": {"x_bias", "residual"},
    "plain": {"stats"},
}
# The same of x narrower than the rest, with a copy in its dtype.
COPYING = {f"{label}, copy": FORWARD[label] | {"copy"} for label in ("training", "inference")}
COPYING["training, dropout, copy"] = FORWARD["training, dropout"] | {"copy"}


def triton_cases() -> Iterator[TritonCase]:
    for width in WIDTHS:
        for dtypes in DTYPES:
            if "->" in dtypes and width != MIXED_WIDTH:
                continue
            for label, given in (FORWARD | (COPYING if "->" in dtypes else {})).items():
                yield _forward(width, dtypes, label, given)
            for dropout in (False, True):
                yield _backward(width, dtypes, dropout)
    for dtypes in ("float32", "float16", "bfloat16"):
        yield _column_sum(dtypes)


def _pointer(dtype: str, given: bool = True) -> str | None:
    return f"*{dtype}:16" if given else None


def _forward(width: int, dtypes: str, label: str, given: set[str]) -> TritonCase:
    from . import triton

    x, rest = DTYPES[dtypes]
    config = triton.forward_config(width, ITEM_BYTES[rest])
    dropout = "dropout" in given
    arguments = {
        "x_ptr": _pointer(x),
        "residual_ptr": _pointer(rest, "residual" in given),
        "x_bias_ptr": _pointer(rest, "x_bias" in given),
        "weight_ptr": _pointer(rest),
        "bias_ptr": _pointer(rest),
        "seed_ptr": _pointer("i64", dropout),
        "row_index_ptr": _pointer("i64", dropout),
        "y_ptr": _pointer(rest),
        "z_ptr": _pointer(rest, "z" in given),
        "mean_ptr": _pointer("fp32", "stats" in given),
        "rstd_ptr": _pointer("fp32", "stats" in given),
        "copy_ptr": _pointer(x, "copy" in given),
        "x_row_stride": "i32:16",
        "residual_row_stride": "i32:16",
        "eps": "fp32",
        "site": "i32",
        "threshold": "i32",
        "keep_scale": "fp32",
        "N": width,
        "BLOCK_N": config.block_n,
        "GROUP": config.group,
    }
    threads = 32 * config.num_warps
    case = Case(
        f"{width}, {label}",
        dtypes,
        threads,
        elements=width / threads,
        scalar_loads=2 if dropout else 0,
        scalar_stores=2 if "stats" in given else 0,
    )
    return TritonCase(triton.layer_norm_fwd_kernel, arguments, config.num_warps, case)


def _backward(width: int, dtypes: str, dropout: bool) -> TritonCase:
    from . import triton

    x, rest = DTYPES[dtypes]
    config = triton.backward_config(width, ITEM_BYTES[rest])
    arguments = {
        "dy_ptr": _pointer(rest),
        "z_ptr": _pointer(rest),
        "mean_ptr": _pointer("fp32"),
        "rstd_ptr": _pointer("fp32"),
        "weight_ptr": _pointer(rest),
        "seed_ptr": _pointer("i64", dropout),
        "row_index_ptr": _pointer("i64", dropout),
        "dz_ptr": _pointer(rest),
        # Without dropout and with one dtype dx is dz.
        "dx_ptr": _pointer(x, dropout or x != rest),
        "dweight_ptr": _pointer("fp32"),
        "dbias_ptr": _pointer("fp32"),
        "dx_bias_ptr": _pointer("fp32"),
        "dy_row_stride": "i32:16",
        "z_row_stride": "i32:16",
        "n_rows": "i32",
        "site": "i32",
        "threshold": "i32",
        "keep_scale": "fp32",
        "N": width,
        "BLOCK_N": config.block_n,
        "GROUP": config.group,
        "ROWS": config.rows,
    }
    threads = 32 * config.num_warps
    case = Case(
        f"{width}, dropout" if dropout else f"{width}",
        dtypes,
        threads,
        elements=width / threads,
        loop=True,
        scalar_loads=4 if dropout else 2,
    )
    return TritonCase(triton.layer_norm_bwd_kernel, arguments, config.num_warps, case)


def _column_sum(dtypes: str) -> TritonCase:
    from .. import triton_column_sum as shared

    out = _pointer(DTYPES[dtypes][1])
    arguments = {
        "partial_ptr": _pointer("fp32"),
        "out0_ptr": out,
        "out1_ptr": out,
        "out2_ptr": out,
        "n_partials": "i32",
        "N": "i32:16",
        "BLOCK_P": shared.BLOCK_P,
        "BLOCK_N": shared.BLOCK_N,
    }
    threads = 32 * shared.NUM_WARPS
    elements = shared.BLOCK_P * shared.BLOCK_N / threads
    label = f"{shared.BLOCK_P} x {shared.BLOCK_N}"
    case = Case(label, dtypes, threads, elements=elements, loop=True)
    return TritonCase(shared.column_sum_kernel, arguments, shared.NUM_WARPS, case)


CUDA_NAMES = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16"}


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """What a template instance of csrc/kernels/layer_norm.cu or column_sum.cu is, if it is one."""
    if kernel == "column_sum_kernel":
        # Its loop is unrolled by the compiler as it likes: no figure for each element.
        return Case("32 columns", CUDA_NAMES[arguments[0]], 256, None, dynamic_shared=1024)
    if kernel not in ("layer_norm_forward_kernel", "layer_norm_backward_kernel"):
        return None
    forward = kernel == "layer_norm_forward_kernel"
    x, rest = (CUDA_NAMES[name] for name in arguments[:2])
    split = arguments[2][len("Split<") : -1].split(", ")
    vec, per_thread, row_threads = map(int, split[:3])
    full, dropout = split[3] == "true", arguments[3] == "true"
    threads = max(128, row_threads)
    label = f"vec {vec} x {per_thread} x {row_threads} threads"
    if full:  # a width's own kernels; the others serve many widths, with and without dropout
        label = f"{vec * per_thread * row_threads}: {label}" + ", dropout" * dropout
    label += ", copy" * (forward and arguments[4] == "true")
    reduce_bytes = 2 * row_threads // 32 * 4 if row_threads > 32 else 0
    columns = vec * per_thread * row_threads + (row_threads if row_threads < 32 else 0)
    partial_bytes = 0 if forward else threads // row_threads * columns * 4
    return Case(
        label,
        rest if x == rest else f"{x}->{rest}",
        threads,
        elements=vec * per_thread,
        loop=not forward,
        scalar_loads=2 * dropout + 2 * (not forward),
        scalar_stores=2 * forward,
        dynamic_shared=max(reduce_bytes, partial_bytes),
    )
