"""attention's kernels as `bertfast kernels` compiles and labels them.

An element is a score: those of a block of queries by keys, which is one turn of the longest loop.
In the forward and in dq over a plan's tiles that is the loop for sequences' ends and for tiles of
several sequences, with its shorter steps. A kernel without a loop is counted whole. In the CUDA
backward a loop's turn has several steps in an inner loop: what is counted is one of them and all
that runs once a turn, which is more than runs for each.
"""

from collections.abc import Iterator

from ..aot import Case, TritonCase
from .config import architecture, block_d, config

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Layout -> the pointers that are there, and the plan's tile.
LAYOUTS = {
    "padded": (set(), 0),
    "masked": ({"mask"}, 0),
    "packed": ({"cu"}, 0),
    "planned": ({"cu", "tiles"}, 64),
    "planned by 32": ({"cu", "tiles"}, 32),
}
# Pass -> (layout, length of the longest sequence), with dropout; those without it, as the rest
# differs from them only by having less to do.
FORMS = {
    "forward": [("masked", 128), ("masked", 512), ("packed", 512)]
    + [("planned", 512), ("planned by 32", 512)],
    "dq": [("masked", 512), ("packed", 512), ("planned", 512), ("planned by 32", 512)],
    "dkv": [("masked", 512), ("packed", 512), ("planned", 512), ("planned by 32", 512)],
    "whole": [("masked", 64), ("masked", 128), ("packed", 128)]
    + [("planned", 64), ("planned by 32", 32)],
}
WITHOUT_DROPOUT = {
    "forward": FORMS["forward"],
    "dq": [("packed", 512)],
    "dkv": [("packed", 512), ("planned", 512)],
    "whole": [("packed", 128)],
}


def triton_cases(capability: int = 80) -> Iterator[TritonCase]:
    """Everything in bfloat16 at head dimension 64; the others where they differ most."""
    arch = architecture(capability)
    for pass_, forms in FORMS.items():
        for layout, length in forms:
            yield case(pass_, layout, "bfloat16", 64, length, True, arch)
        for layout, length in WITHOUT_DROPOUT[pass_]:
            yield case(pass_, layout, "bfloat16", 64, length, False, arch)
        length = 128 if pass_ == "whole" else 512
        yield case(pass_, "masked", "float16", 64, length, True, arch)
        yield case(pass_, "masked", "bfloat16", 32, length, True, arch)
        if pass_ != "whole":
            yield case(pass_, "masked", "float32", 64, length, True, arch)
            for head_dim in (96, 128):
                yield case(pass_, "masked", "bfloat16", head_dim, length, True, arch)


def case(pass_, layout, dtype, head_dim, length, dropout, arch=80, chosen=None) -> TritonCase:
    from . import triton_bwd_dkv, triton_bwd_dq, triton_fwd

    given, tile = LAYOUTS[layout]
    given = given | ({"seed"} if dropout else set())
    short = DTYPES[dtype]
    if chosen is None:
        size = ITEM_BYTES[dtype]
        chosen = config(pass_, arch, size, head_dim, length, dropout, tile)
    kernel = {
        "forward": triton_fwd.attention_fwd_kernel,
        "dq": triton_bwd_dq.attention_bwd_dq_kernel,
    }.get(pass_, triton_bwd_dkv.attention_bwd_dkv_kernel)
    single = (chosen.block_n if pass_ == "forward" else chosen.block_m) >= length
    pointers = {"mask_ptr": "*u8:16", "cu_ptr": "*i32:16", "tiles_ptr": "*i32:16"}
    pointers |= {"seed_ptr": "*i64:16", "lse_ptr": "*fp32:16", "delta_ptr": "*fp32:16"}
    absent = {"whole": {"delta_ptr"}, "dkv": {"dq_ptr"}}.get(pass_, set())
    values = {"scale": "fp32", "scale_log2": "fp32", "keep_scale": "fp32", "heads": "i32"}
    values |= {"n_tiles": "i32", "length": "i32", "site": "i32", "threshold": "i32"}
    values |= {
        "D": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_T": chosen.block_t,
        "PARTS": max(1, tile // (chosen.block_m if pass_ in ("forward", "dq") else chosen.block_n)),
        "TF32": False,
        "STAGES": chosen.num_stages,
        "WHOLE": pass_ == "whole",
        "SINGLE": pass_ in ("forward", "whole") and single,
    }
    arguments: dict[str, str | int | None] = {}
    for name in kernel.arg_names:
        if name in values:
            arguments[name] = values[name]
        elif name.endswith("_ptr"):
            optional = name[:-4] in ("mask", "cu", "tiles", "seed") and name[:-4] not in given
            missing = optional or name in absent
            arguments[name] = None if missing else pointers.get(name, f"*{short}:16")
        else:
            arguments[name] = "i32:16"  # strides
    threads = 32 * chosen.num_warps
    shorter = tile and pass_ in ("forward", "dq") and not values["SINGLE"]
    columns = chosen.block_t if shorter else chosen.block_n
    described = Case(
        f"{pass_}, {layout}, D {head_dim}, up to {length}" + ", dropout" * dropout,
        dtype,
        threads,
        elements=chosen.block_m * columns / threads,
        loop=not values["SINGLE"],
        again=bool(tile),
        scalar_stores=1,
    )
    return TritonCase(kernel, arguments, chosen.num_warps, described)


CUDA_NAMES = {"__half": "float16", "__nv_bfloat16": "bfloat16"}
_STAGES = 2
_CUDA_WARPS = 4  # of a block, of 16 rows each


def _cuda_keys_at_a_time(kernel: str, head_dim: int) -> tuple[int, int]:
    """Rows of the streamed side that lie in a stage, and that one turn of the loop works on."""
    if kernel == "attention_forward_kernel":
        keys = 64 if head_dim <= 64 else 32
        return keys, keys
    if kernel == "attention_backward_dq_kernel":
        return 64, 32
    return (64 if head_dim <= 64 else 32), 16


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """What a template instance of csrc/kernels/attention_*.cu is, if it is one."""
    names = ("forward", "backward_dq", "backward_dkv")
    if kernel not in [f"attention_{name}_kernel" for name in names]:
        return None
    dtype, head_dim, dropout = arguments[0], int(arguments[1]), arguments[2] == "true"
    in_stage, at_a_time = _cuda_keys_at_a_time(kernel, head_dim)
    row_bytes = 2 * head_dim
    shared = _STAGES * 2 * in_stage * row_bytes
    # Where the tile lies, and of a shared one its keys and what threads know of it. A key mask adds
    # a bit a key.
    shared += 64 + 4 * (2 * _CUDA_WARPS + 6) + 8 * 32 * _CUDA_WARPS
    if kernel == "attention_backward_dkv_kernel":
        shared += _STAGES * in_stage * 8  # lse and delta
        shared += 2 * 16 * _CUDA_WARPS * row_bytes if head_dim > 64 else 0
    return Case(
        f"D {head_dim}, {16 * _CUDA_WARPS} x {at_a_time}" + ", dropout" * dropout,
        CUDA_NAMES[dtype],
        threads=32 * _CUDA_WARPS,
        elements=16 * at_a_time / 32,
        loop=True,
        again=True,
        scalar_loads=1 if kernel == "attention_backward_dkv_kernel" else 0,  # lse with delta
        dynamic_shared=shared,
    )
