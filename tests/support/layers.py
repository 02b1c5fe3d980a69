"""Small layers on a backend, given as (name, device), with their inputs and gradients."""

import torch

from bertfast.nn import EncoderLayer
from bertfast.nn.bert import bert_parts
from bertfast.nn.layer import Call, run_layer
from bertfast.packing.batch import Batch, pack

WIDTH, HEADS, INNER, ROWS, LENGTH = 32, 2, 64, 3, 10
LENGTHS = (10, 4, 7)


class PreNorm(EncoderLayer):
    """Each norm in front of its block."""

    def forward(self, x, batch=None):
        norms = self.attention.output.LayerNorm, self.output.LayerNorm
        call = Call(
            batch or Batch(), self._joined, self.training, self.backend, self.recompute, id(self)
        )
        return run_layer(bert_parts(self, norms), x, call)


def make(backend, dropout=0.0, dtype=torch.bfloat16, kind=EncoderLayer, **options) -> EncoderLayer:
    torch.manual_seed(1)
    made = kind(
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
