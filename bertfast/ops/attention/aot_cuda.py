"""attention's CUDA kernels as `bertfast kernels` labels them: a function for each, by its name.

In the backward a loop's turn has several steps in an inner loop: what is counted is one of them and
all that runs once a turn, which is more than runs for each.
"""

from collections.abc import Callable
from dataclasses import replace

from ..aot import CUDA_NAMES, Case, Work

STAGES = 2
WARPS = 4  # of a block, of 16 rows each
ROWS = 16 * WARPS
# Where the tile lies, and of a shared one its keys and what threads know of it. A key mask adds a
# bit a key.
BESIDE_TILES = 64 + 4 * (2 * WARPS + 6) + 8 * 32 * WARPS


BIAS_LINES = WARPS * 64 * 4  # a warp's biases, by distance


def cuda_case(kernel: str, arguments: list[str]) -> Case | None:
    """The case of a template instance of csrc/kernels/attention, if it is one."""
    if kernel == "rotate_kernel":
        return _rotate(CUDA_NAMES[arguments[0]], int(arguments[1]))
    of_kernel = _KERNELS.get(kernel)
    if of_kernel is None:
        return None
    dtype, head_dim, *dropout = arguments
    return of_kernel(CUDA_NAMES[dtype], int(head_dim), dropout == ["true"])


def _rotate(dtype: str, vec: int) -> Case:
    """A turn: of four heads' queries and keys a vector of either half."""
    return Case(
        f"rotate, vec {vec}", dtype, 32 * WARPS, elements=16 * vec, loop=True, scalar_loads=1
    )


def _forward_tiles(dtype: str, head_dim: int, dropout: bool) -> Case:
    keys = 64 if head_dim <= 64 else 32
    return _tiles((dtype, head_dim, dropout), 2, keys, keys, scales=True, wgmma=head_dim == 64)


def _forward_double(dtype: str, head_dim: int, dropout: bool) -> Case:
    keys = 64 if head_dim <= 64 else 32
    queries = 2 * head_dim * 2 * ROWS  # bytes: of wider heads more than a stage has room for
    beyond_stage = {96: queries - 4 * head_dim * keys, 128: queries}.get(head_dim, 0)
    return _double(_forward_tiles(dtype, head_dim, dropout), beyond_stage)


def _dq_double(dtype: str, head_dim: int, dropout: bool) -> Case:
    keys = 32
    case = _tiles((dtype, head_dim, dropout), 3, keys, keys)
    # q and dout, by way of one stage; tiles of 64 ask for less.
    return _double(case, 2 * 2 * head_dim * 2 * ROWS - 4 * head_dim * keys)


def _dkv_double(dtype: str, head_dim: int, dropout: bool) -> Case:
    queries = 64 if head_dim <= 32 else 32
    others = STAGES * queries * 8  # lse and delta
    case = _tiles((dtype, head_dim, dropout), 4, queries, 16, scalar_loads=1, others=others)
    # Values stay before the stages; keys come by way of one of them and what is behind it.
    own, stage = 2 * ROWS * 2 * head_dim, 2 * queries * 2 * head_dim
    return _double(case, own + max(0, own - stage))


def _double(case: Case, beyond_stage: int) -> Case:
    """A kernel of tiles of 128 rows, of a case in tiles of 64. The longest loop is that of its
    tiles of 64, which some blocks have: only hot paths count. beyond_stage: more bytes of shared
    memory."""
    assert case.work is not None
    rows = 2 * ROWS
    products = tuple((rows, depth) for _, depth in case.work.products)
    return replace(
        case,
        label=case.label.replace(f"{ROWS} x", f"{rows} x"),
        elements=None,
        dynamic_shared=case.dynamic_shared + beyond_stage,
        empty_on=90,
        work=replace(case.work, rows=rows, products=products, wgmma=False),
    )


def _forward_bulk(dtype: str, head_dim: int, dropout: bool) -> Case:
    """Two warpgroups' queries, four stages of keys and values, barriers and what lies beside. Of
    heads that are no whole 64 columns a copy has zeros too."""
    rows, keys, stages = 2 * ROWS, 64, 4
    columns = 128 if head_dim > 64 else head_dim
    tiles = (rows + stages * 2 * keys) * 2 * columns
    work = Work(
        *(rows, keys, head_dim, ((rows, head_dim),) * 2),
        streamed=keys,
        dropout=dropout,
        scales=True,
        wgmma=True,
    )
    return Case(
        f"D {head_dim}, {rows} x {keys}" + ", dropout" * dropout,
        dtype,
        threads=2 * 32 * WARPS,
        elements=None,  # its longest loop isn't the main one
        loop=True,
        dynamic_shared=tiles + 64 + 2 * stages * 8 + 2 * 16 + 8 * 32 * WARPS,
        work=work,
        capability=90,
    )


def _dq_tiles(dtype: str, head_dim: int, dropout: bool) -> Case:
    return _tiles((dtype, head_dim, dropout), 3, 64, 32)


def _dkv_tiles(dtype: str, head_dim: int, dropout: bool) -> Case:
    queries = 64 if head_dim <= 64 else 32
    others = STAGES * queries * 8  # lse and delta
    others += 2 * ROWS * 2 * head_dim if head_dim > 64 else 0
    return _tiles((dtype, head_dim, dropout), 4, queries, 16, scalar_loads=1, others=others)


def _by_position(case: Case) -> Case:
    """Of calls with a window or a bias: the path of one where nothing is masked and nothing added
    counts, and what it loads of a bias is no row data."""
    return replace(
        case,
        label=f"{case.label}, by position",
        scalar_loads=case.scalar_loads + 8,
        dynamic_shared=case.dynamic_shared + BIAS_LINES,
    )


def _forward_by_position(dtype: str, head_dim: int, dropout: bool) -> Case:
    return _by_position(_forward_tiles(dtype, head_dim, dropout))


def _dq_by_position(dtype: str, head_dim: int, dropout: bool) -> Case:
    return _by_position(_dq_tiles(dtype, head_dim, dropout))


def _dkv_by_position(dtype: str, head_dim: int, dropout: bool) -> Case:
    return _by_position(_dkv_tiles(dtype, head_dim, dropout))


def _bias_gradient(dtype: str, head_dim: int, dropout: bool) -> Case:
    """q, dout, keys and values of a block of scores, in one stage."""
    work = Work(*(ROWS, ROWS, head_dim, ((ROWS, head_dim),) * 2), streamed=2 * ROWS)
    return Case(
        f"D {head_dim}, {ROWS} x {ROWS}",
        dtype,
        threads=32 * WARPS,
        elements=16 * ROWS / 32,
        loop=True,
        again=True,
        scalar_loads=4 + 8,  # lse with delta, where a sequence lies, and the bias
        dynamic_shared=4 * ROWS * 2 * head_dim + BESIDE_TILES + BIAS_LINES,
        work=work,
    )


def _dq_bulk(dtype: str, head_dim: int, dropout: bool) -> Case:
    return _bulk((dtype, head_dim, dropout), 3)


def _dkv_bulk(dtype: str, head_dim: int, dropout: bool) -> Case:
    return _bulk((dtype, head_dim, dropout), 4, scalar_loads=1)  # lse with delta


def _bulk(form: tuple[str, int, bool], products: int, scalar_loads: int = 0) -> Case:
    """A kernel of the backward by bulk copies: two tiles of each of two tensors, four stages, two
    blocks' lse and delta for each tile, and what lies beside them."""
    dtype, head_dim, dropout = form
    rows, streamed, stages = 2 * ROWS, 64, 4
    work = Work(
        *(rows, streamed, head_dim, ((rows, head_dim),) * products),
        streamed=streamed,
        dropout=dropout,
        wgmma=True,
    )
    columns = 32 if head_dim == 32 else 64 * -(-head_dim // 64)  # as they lie in shared memory
    tiles = (2 * rows + stages * 2 * streamed) * 2 * columns
    beside = 2 * stages * 8 + 2 * 64 + 8 * 32 * WARPS + 16
    return Case(
        f"D {head_dim}, {rows} x {streamed}" + ", dropout" * dropout,
        dtype,
        threads=2 * 32 * WARPS,
        elements=rows * streamed / (2 * 32 * WARPS),
        loop=True,
        again=True,
        scalar_loads=scalar_loads,
        dynamic_shared=tiles + beside + 2 * 2 * streamed * 8,
        work=work,
        capability=90,
    )


def _tiles(
    form: tuple[str, int, bool],
    products: int,
    in_stage: int,
    at_a_time: int,
    *,
    scales: bool = False,
    wgmma: bool = False,
    scalar_loads: int = 0,
    others: int = 0,
) -> Case:
    """A kernel in tiles of 64 rows. in_stage: rows of the streamed side that lie in a stage;
    at_a_time: those that a step works on; others: bytes of shared memory beside the stages."""
    dtype, head_dim, dropout = form
    work = Work(
        *(ROWS, in_stage, head_dim, ((ROWS, head_dim),) * products),
        streamed=in_stage,
        dropout=dropout,
        scales=scales,
        turns=in_stage // at_a_time,
        wgmma=wgmma,
    )
    return Case(
        f"D {head_dim}, {ROWS} x {at_a_time}" + ", dropout" * dropout,
        dtype,
        threads=32 * WARPS,
        elements=16 * at_a_time / 32,
        loop=True,
        again=True,
        scalar_loads=scalar_loads,
        dynamic_shared=STAGES * 2 * in_stage * 2 * head_dim + BESIDE_TILES + others,
        work=work,
    )


_KERNELS: dict[str, Callable[[str, int, bool], Case]] = {
    "attention_forward_kernel": _forward_tiles,
    "attention_forward_double_kernel": _forward_double,
    "attention_forward_bulk_kernel": _forward_bulk,
    "attention_backward_dq_double_kernel": _dq_double,
    "attention_backward_dq_kernel": _dq_tiles,
    "attention_backward_dkv_double_kernel": _dkv_double,
    "attention_backward_dkv_kernel": _dkv_tiles,
    "attention_forward_by_position_kernel": _forward_by_position,
    "attention_backward_dq_by_position_kernel": _dq_by_position,
    "attention_backward_dkv_by_position_kernel": _dkv_by_position,
    "attention_backward_bias_kernel": _bias_gradient,
    "attention_backward_dq_bulk_kernel": _dq_bulk,
    "attention_backward_dkv_bulk_kernel": _dkv_bulk,
}
