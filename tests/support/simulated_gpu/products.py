"""Products that only a GPU has."""

import torch


def mm(a, b, out_dtype=None, *, out=None, real=torch.mm):
    """A CPU has no products of 16-bit operands with results in float32, as a GPU does."""
    if out_dtype is None:
        return real(a, b, out=out)
    assert a.dtype == b.dtype and a.dtype.itemsize == 2 and out_dtype == torch.float32
    product = real(a.float(), b.float())
    return product if out is None else out.copy_(product)
