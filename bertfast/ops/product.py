"""A product whose result may have a wider dtype than its operands."""

import torch


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out with a b: operands in 16 bits may have their sums in float32, unrounded."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
