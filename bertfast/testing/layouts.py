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
