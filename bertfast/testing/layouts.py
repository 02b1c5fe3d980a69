"""Memory layouts that an op must read in place or copy, but never misread."""

import torch


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout; what lies between them is NaN."""
    if layout == "rows apart":
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 24), torch.nan)
        view = wide[..., 8 : 8 + tensor.shape[-1]]
    elif layout == "transposed":
        view = torch.empty_like(tensor.transpose(0, 1).contiguous()).transpose(0, 1)
    elif layout == "strided":
        view = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)[..., ::2]
    else:
        return tensor
    view.copy_(tensor)
    return view


def rows_apart(values: torch.Tensor, layout: str) -> torch.Tensor:
    """A product's operand. rows apart: a gap of 16 bytes between rows, which kernels may read;
    shifted: one of 2 bytes before and between them, which they may not."""
    gap = {"contiguous": 0, "rows apart": 8, "shifted": 1}[layout]
    rows, width = values.shape
    wide = torch.full((rows, width + gap), torch.nan, dtype=values.dtype)
    view = wide[:, gap % 8 : gap % 8 + width]
    view.copy_(values)
    return view
