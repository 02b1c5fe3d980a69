"""Small layers on a backend, given as (name, device), with their inputs and gradients."""

import torch

from bertfast.nn import EncoderLayer
from bertfast.packing.batch import Batch, pack

WIDTH, HEADS, INNER, ROWS, LENGTH = 32, 2, 64, 3, 10
LENGTHS = (10, 4, 7)


def make(backend, dropout=0.0, dtype=torch.bfloat16, **options) -> EncoderLayer:
    torch.manual_seed(1)
    made = EncoderLayer(
        *(WIDTH, HEADS, INNER),
        **dict(dropout=dropout, attention_dropout=dropout, backend=backend[0], **options),
    )
    for parameter in made.parameters():  # biases and norms that matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.to(backend[1], dtype)


def make_batch(backend, kind="padded"):
    mask = (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).to(backend[1])
    if kind == "packed":
        return pack(mask, mask.device, backend[0])
    return Batch(key_mask=mask) if kind == "masked" else Batch()


def make_input(backend, batch=None, dtype=torch.bfloat16):
    torch.manual_seed(2)
    x = torch.randn(ROWS, LENGTH, WIDTH, device=backend[1]).to(dtype)
    return (batch.pack(x) if batch is not None and batch.packed else x).requires_grad_()


def gradients(module, x, batch=None, seed=3):
    """The output, and the gradient of each leaf that wants one."""
    torch.manual_seed(seed)
    y = module(x, batch)
    leaves = [leaf for leaf in (x, *module.parameters()) if leaf.requires_grad]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
