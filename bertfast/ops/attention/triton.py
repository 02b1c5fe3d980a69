"""attention in Triton: launches of the kernels in triton_fwd.py and triton_bwd_*.py."""

import functools
import math

import torch

from ...packing.sequences import Sequences
from .. import triton_lib
from ..dropout import Dropout
from ..pointers import dense, head_strides, row_stride, shared_head_strides
from ..triton_launch import Launch
from . import limits
from .config import Config, architecture, block_d, config
from .run import AnyHeads, Saved, parts
from .scores import Scores
from .triton_bwd_dkv import attention_bwd_dkv_kernel
from .triton_bwd_dq import attention_bwd_dq_kernel
from .triton_fwd import attention_fwd_kernel


def unsupported_reason(
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    size: limits.Size | None = None,
    features: tuple[str, ...] = (),
) -> str | None:
    reason = triton_lib.unsupported_reason(device)
    return reason or limits.unsupported_reason("triton", dtype, head_dim, size, features)


_LOG2_E = math.log2(math.e)
_class_of = functools.cache(architecture)
_forward = Launch(attention_fwd_kernel)
_backward_dq = Launch(attention_bwd_dq_kernel)
_backward_dkv = Launch(attention_bwd_dkv_kernel)


class _Batch:
    """The arguments about a batch, the same for all kernels."""

    def __init__(
        self, q: torch.Tensor, sequences: Sequences, scores: Scores, drop: Dropout
    ) -> None:
        self.heads, self.head_dim = q.shape[-2:]
        self.arch = _class_of(triton_lib.capability(q))
        self.itemsize = q.element_size()
        self.dropout = drop.threshold != 0
        key_mask, cu_seqlens = sequences.key_mask, sequences.cu_seqlens
        if cu_seqlens is not None:
            self.rows, self.length = cu_seqlens.shape[0] - 1, sequences.max_seqlen
            lse_strides = (0, q.shape[0])
        else:
            self.rows, self.length = q.shape[:2]
            lse_strides = (self.heads * self.length, self.length)
        self.tiles, self.tile = sequences.tiles, sequences.tile
        size = (self.itemsize, self.head_dim, self.length, self.dropout, self.tile)
        self.case = (*size, key_mask is not None, q.device if q.is_cuda else None)
        # A tile more where dropout's coordinates start inside the row, at a multiple of the tile.
        self.extra = int(key_mask is not None and self.dropout)
        mask = None if key_mask is None else key_mask.view(torch.uint8)
        self.layout = (mask, dense(cu_seqlens), dense(self.tiles), dense(drop.seed))
        mask_stride = 0 if mask is None else row_stride(mask, self.length)
        self.mask_and_lse = (mask_stride, *lse_strides, self.heads)
        self.scale, self.scale_log2 = scores.scale, scores.scale * _LOG2_E
        self.drop = (drop.site, min(drop.threshold, 65535), drop.scale)
        # float32 is multiplied as float32, unless torch itself may use TF32.
        self.tf32 = q.dtype == torch.float32 and (
            torch.backends.cuda.matmul.fp32_precision == "tf32"  # reading allow_tf32 may raise
        )

    def config_of_whole(self) -> Config | None:
        """The configuration of the whole backward in one kernel, where there is one."""
        return config("whole", self.arch, *self.case)

    def config(self, pass_: str) -> Config:
        chosen = config(pass_, self.arch, *self.case)
        if chosen is None:
            raise LookupError(f"no configuration of {pass_} for {self.case}")
        return chosen

    def grid(self, block: int, extra: int) -> tuple[tuple[int], int]:
        """The number of programs, and that of a head's tiles of `block` tokens."""
        if self.tiles is not None:
            n_tiles = self.tiles.shape[0] * (self.tile // block)
            return (n_tiles * self.heads,), n_tiles
        n_tiles = -(-self.length // block) + extra
        return (n_tiles * self.heads * self.rows,), n_tiles

    def blocks(self, chosen: Config) -> tuple[int, int, int, int]:
        """D, BLOCK_D, BLOCK_M and BLOCK_N."""
        return _blocks(self.head_dim, chosen)

    def shares(self, chosen: Config, block: int) -> tuple[int, bool, int]:
        """PARTS, TF32 and STAGES. block: what a program owns."""
        return self.tile // block if self.tile else 1, self.tf32, chosen.num_stages


@functools.lru_cache(256)
def _blocks(head_dim: int, chosen: Config) -> tuple[int, int, int, int]:
    return head_dim, block_d(head_dim), chosen.block_m, chosen.block_n


def forward(
    heads: AnyHeads,
    sequences: Sequences,
    scores: Scores,
    dropout: Dropout,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out and, if it is given, lse. The last dimension of every tensor is dense."""
    q, k, v = parts(heads)
    batch = _Batch(q, sequences, scores, dropout)
    chosen = batch.config("forward")
    grid, n_tiles = batch.grid(chosen.block_m, batch.extra)
    with triton_lib.on_device(q):
        _forward(
            grid,
            (q, k, v, out, dense(lse), *batch.layout),
            (*head_strides(q), *head_strides(k), *head_strides(v), *head_strides(out)),
            (*batch.mask_and_lse, n_tiles, batch.length, batch.scale_log2, *batch.drop),
            (
                *(*batch.blocks(chosen), chosen.block_t),
                *(*batch.shares(chosen, chosen.block_m), chosen.block_n >= batch.length),
            ),
            chosen.num_warps,
        )


def backward(
    dout: torch.Tensor,
    heads: AnyHeads,
    saved: Saved,
    sequences: Sequences,
    scores: Scores,
    dropout: Dropout,
    grads: AnyHeads,
    bias_grad: torch.Tensor | None,
) -> None:
    """Fills the gradients, whose strides are the same."""
    q, k, v = parts(heads)
    dq, dk, dv = parts(grads)
    if saved.lse is None:
        raise AssertionError("the forward saved no lse for this backward")
    batch = _Batch(q, sequences, scores, dropout)
    layout, out, lse = batch.layout, saved.out, dense(saved.lse)
    inputs = (*head_strides(dout), *head_strides(q), *head_strides(k), *head_strides(v))
    outputs = shared_head_strides(dq, dk, dv)
    numbers = (batch.length, batch.scale, batch.scale_log2, *batch.drop)
    with triton_lib.on_device(q):
        chosen, delta = batch.config_of_whole(), None
        whole = chosen is not None
        if chosen is None:
            delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
            chosen = batch.config("dq")
            grid, n_tiles = batch.grid(chosen.block_m, batch.extra)
            _backward_dq(
                grid,
                (dout, q, k, v, out, lse, delta, dq, *layout),
                (*inputs, *head_strides(out), *outputs),
                (*batch.mask_and_lse, n_tiles, *numbers),
                (*batch.blocks(chosen), chosen.block_t, *batch.shares(chosen, chosen.block_m)),
                chosen.num_warps,
            )
            chosen = batch.config("dkv")
        grid, n_tiles = batch.grid(chosen.block_n, 0 if whole else batch.extra)
        _backward_dkv(
            grid,
            (dout, q, k, v, lse, delta, dq, dk, dv, *layout),
            (*inputs, *outputs),
            (*batch.mask_and_lse, n_tiles, *numbers),
            (
                *(*batch.blocks(chosen), *batch.shares(chosen, chosen.block_n)),
                *(whole, whole and chosen.block_m >= batch.length),
            ),
            chosen.num_warps,
        )
