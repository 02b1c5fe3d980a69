"""attention in Triton: which kernels run with what; they are in triton_fwd.py, triton_bwd_*.py."""

import math

import torch
import triton

from .. import dropout, triton_lib
from ..pointers import dense, head_strides, row_stride, shared_head_strides
from . import limits
from .config import Config, block_d, config, device_architecture
from .triton_bwd_dkv import attention_bwd_dkv_kernel
from .triton_bwd_dq import attention_bwd_dq_kernel
from .triton_fwd import attention_fwd_kernel


def unsupported_reason(device_type, dtype=None, head_dim=None, size=None) -> str | None:
    reason = triton_lib.unsupported_reason(device_type)
    if reason is None and dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        reason = f"q must be float32, float16 or bfloat16, got {dtype}"
    return reason or limits.unsupported_reason(head_dim, size, None)


class _Batch:
    """What all kernels are told about a batch."""

    def __init__(self, q, key_mask, cu_seqlens, tiles, tile, seed, max_seqlen, threshold):
        self.heads, self.head_dim = q.shape[-2:]
        self.arch = device_architecture(q.device.index if q.is_cuda else None)
        self.itemsize = q.element_size()
        self.dropout = threshold != 0
        if cu_seqlens is not None:
            self.rows, self.length = cu_seqlens.shape[0] - 1, max_seqlen
            lse_strides = (0, q.shape[0])
        else:
            self.rows, self.length = q.shape[:2]
            lse_strides = (self.heads * self.length, self.length)
        self.tiles, self.tile = tiles, tile
        # A tile more where dropout's coordinates start inside the row, at a multiple of the tile.
        self.extra = int(key_mask is not None and self.dropout)
        mask = None if key_mask is None else key_mask.view(torch.uint8)
        seed = dense(seed) if threshold else None
        self.layout = (mask, dense(cu_seqlens), dense(tiles), seed)
        mask_stride = 0 if mask is None else row_stride(mask, self.length)
        self.mask_and_lse = (mask_stride, *lse_strides)
        # float32 is multiplied as float32, unless torch itself may use TF32.
        precision = torch.backends.cuda.matmul.fp32_precision  # reading allow_tf32 may raise
        self.tf32 = q.dtype == torch.float32 and precision == "tf32"

    def config(self, pass_: str) -> Config | None:
        case = (self.itemsize, self.head_dim, self.length, self.dropout, self.tile)
        return config(pass_, self.arch, *case)

    def grid(self, block: int, extra: int) -> tuple[tuple[int], int]:
        """How many programs there are, and tiles a head: block tokens each."""
        if self.tiles is not None:
            n_tiles = self.tiles.shape[0] * (self.tile // block)
            return (n_tiles * self.heads,), n_tiles
        n_tiles = triton.cdiv(self.length, block) + extra
        return (n_tiles * self.heads * self.rows,), n_tiles

    def constants(self, chosen: Config, block: int) -> dict:
        """block is what a program owns."""
        return dict(
            PARTS=self.tile // block if self.tile else 1,
            D=self.head_dim,
            BLOCK_D=block_d(self.head_dim),
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            TF32=self.tf32,
            STAGES=chosen.num_stages,
            num_warps=chosen.num_warps,
        )


def forward(
    q,
    k,
    v,
    key_mask,
    cu_seqlens,
    tiles,
    tile,
    seed,
    max_seqlen,
    scale,
    threshold,
    site,
    out,
    lse,
):
    """Fills out and, where it is given, lse. The last dimension of every tensor is dense."""
    batch = _Batch(q, key_mask, cu_seqlens, tiles, tile, seed, max_seqlen, threshold)
    chosen = batch.config("forward")
    grid, n_tiles = batch.grid(chosen.block_m, batch.extra)
    with triton_lib.on_device(q):
        attention_fwd_kernel[grid](
            *(q, k, v, out, dense(lse), *batch.layout),
            *(stride for x in (q, k, v, out) for stride in head_strides(x)),
            *batch.mask_and_lse,
            *(batch.heads, n_tiles, batch.length, scale * math.log2(math.e), site),
            *(min(threshold, 65535), dropout.keep_scale(threshold)),
            **batch.constants(chosen, chosen.block_m),
            BLOCK_T=chosen.block_t,
            SINGLE=chosen.block_n >= batch.length,
        )


def backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    key_mask,
    cu_seqlens,
    tiles,
    tile,
    seed,
    max_seqlen,
    scale,
    threshold,
    site,
    dq,
    dk,
    dv,
):
    """Fills dq, dk and dv, whose strides are the same."""
    batch = _Batch(q, key_mask, cu_seqlens, tiles, tile, seed, max_seqlen, threshold)
    layout, lse = batch.layout, dense(lse)
    inputs = [stride for x in (dout, q, k, v) for stride in head_strides(x)]
    grads = (*shared_head_strides(dq, dk, dv), *batch.mask_and_lse)
    scales = (scale, scale * math.log2(math.e))
    drop = (site, min(threshold, 65535), dropout.keep_scale(threshold))
    with triton_lib.on_device(q):
        chosen, delta = batch.config("whole"), None
        whole = chosen is not None
        if not whole:
            delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
            chosen = batch.config("dq")
            grid, n_tiles = batch.grid(chosen.block_m, batch.extra)
            attention_bwd_dq_kernel[grid](
                *(dout, q, k, v, out, lse, delta, dq, *layout, *inputs, *head_strides(out), *grads),
                *(batch.heads, n_tiles, batch.length, *scales, *drop),
                **batch.constants(chosen, chosen.block_m),
                BLOCK_T=chosen.block_t,
            )
            chosen = batch.config("dkv")
        grid, n_tiles = batch.grid(chosen.block_n, 0 if whole else batch.extra)
        attention_bwd_dkv_kernel[grid](
            *(dout, q, k, v, lse, delta, dq, dk, dv, *layout, *inputs, *grads),
            *(batch.heads, n_tiles, batch.length, *scales, *drop),
            **batch.constants(chosen, chosen.block_n),
            WHOLE=whole,
            SINGLE=whole and chosen.block_m >= batch.length,
        )
