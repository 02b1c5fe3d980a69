"""bias_gelu's kernels as `bertfast kernels` compiles and labels them."""

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
WIDTHS = (1536, 3072, 4096)
MAIN_WIDTH = 3072  # where every form is compiled
ROWS = 16384
FLAT = 2**24  # elements of a tensor without bias, which is one row


def triton_cases() -> Iterator[TritonCase]:
    for width in WIDTHS:
        for dtypes in DTYPES:
            if "->" in dtypes and width != MAIN_WIDTH:
                continue
            for tanh in (False, True) if width == MAIN_WIDTH else (False,):
                yield _forward(width, dtypes, tanh)
                yield _backward(width, dtypes, tanh)
    for dtypes in ("float32", "float16", "bfloat16"):
        yield _backward(MAIN_WIDTH, dtypes, False, want_dbias=False)
        for tanh in (False, True):
            yield _forward(None, dtypes, tanh)
            yield _backward(None, dtypes, tanh)


def _pointer(dtype: str, given: bool = True) -> str | None:
    return f"*{dtype}:16" if given else None


def _label(width: int | None, tanh: bool) -> str:
    return ("no bias" if width is None else f"{width}") + (", tanh" if tanh else "")


def _forward(width: int | None, dtypes: str, tanh: bool) -> TritonCase:
    from . import triton

    x, rest = DTYPES[dtypes]
    rows = 1 if width is None else ROWS
    config = triton.forward_config(width or FLAT, ITEM_BYTES[rest], rows)
    arguments = {
        "x_ptr": _pointer(x),
        "bias_ptr": _pointer(rest, width is not None),
        "y_ptr": _pointer(rest),
        "n_rows": "i32",
        "width": "i32:16",
        "column_tiles": "i32",
        "x_row_stride": "i32:16",
        "TANH": tanh,
        "ROWS": config.rows,
        "BLOCK_N": config.block_n,
        "GROUP": config.group,
    }
    threads = 32 * config.num_warps
    elements = config.rows * config.block_n / threads
    # A tile narrower than the warps beside each other loads its biases once, in narrower pieces.
    narrow = width is not None and config.block_n < threads * config.group
    case = Case(_label(width, tanh), dtypes, threads, elements, scalar_loads=int(narrow))
    return TritonCase(triton.bias_gelu_fwd_kernel, arguments, config.num_warps, case)


def _backward(width: int | None, dtypes: str, tanh: bool, want_dbias: bool = True) -> TritonCase:
    from . import triton

    x, rest = DTYPES[dtypes]
    rows, biased = (1, False) if width is None else (ROWS, True)
    want_dbias &= biased
    config = triton.backward_config(width or FLAT, ITEM_BYTES[rest], rows)
    arguments = {
        "dy_ptr": _pointer(rest),
        "x_ptr": _pointer(x),
        "bias_ptr": _pointer(rest, biased),
        "dx_ptr": _pointer(x),
        "dbias_ptr": _pointer("fp32", want_dbias),
        "n_rows": "i32",
        "width": "i32:16",
        "column_tiles": "i32",
        "dy_row_stride": "i32:16",
        "x_row_stride": "i32:16",
        "TANH": tanh,
        "ROWS": config.rows,
        "STEPS": config.steps,
        "BLOCK_N": config.block_n,
        "GROUP": config.group,
    }
    threads = 32 * config.num_warps
    elements = config.rows * config.block_n / threads
    label = _label(width, tanh) + (", frozen bias" if biased and not want_dbias else "")
    case = Case(label, dtypes, threads, elements, loop=config.steps > 1)
    return TritonCase(triton.bias_gelu_bwd_kernel, arguments, config.num_warps, case)


CUDA_NAMES = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16"}
CUDA_THREADS = 256  # of a block, at most


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """What a template instance of csrc/kernels/bias_gelu.cu is, if it is one."""
    if kernel not in ("bias_gelu_forward_kernel", "bias_gelu_backward_kernel"):
        return None
    x, rest = (CUDA_NAMES[name] for name in arguments[:2])
    vec, rows = map(int, arguments[2:4])
    label = f"vec {vec} x {rows} rows" + ", tanh" * (arguments[4] == "true")
    if arguments[5:] == ["false"]:
        label += ", no bias"
    return Case(
        label,
        rest if x == rest else f"{x}->{rest}",
        CUDA_THREADS,
        elements=vec * rows,
        loop=kernel == "bias_gelu_backward_kernel",
    )
