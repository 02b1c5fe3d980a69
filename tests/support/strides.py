"""The same values in memory that is laid out at random, for the fuzz."""

import random

import torch

WAYS = ("dense", "offset", "rows apart", "every second", "permuted", "negated", "expanded")


def relaid(rng: random.Random, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor with other strides or another start; with "expanded" one slice stands for all of a
    dimension, so that values change too."""
    if tensor is None:
        return None
    way = rng.choice(WAYS)
    if way == "negated" and tensor.is_floating_point():
        return torch._neg_view(-tensor)
    if tensor.dim() == 0:
        return tensor
    if way == "offset":
        start = rng.randrange(1, 9)
        flat = tensor.new_zeros(start + tensor.numel())
        return flat[start:].view(tensor.shape).copy_(tensor)
    if way == "rows apart":
        start, more = rng.randrange(5), rng.randrange(1, 9)
        wide = tensor.new_ones(*tensor.shape[:-1], start + tensor.shape[-1] + more)
        return wide[..., start : start + tensor.shape[-1]].copy_(tensor)
    if way == "every second":
        wide = tensor.new_ones(*tensor.shape[:-1], 2 * tensor.shape[-1])
        return wide[..., ::2].copy_(tensor)
    if way == "permuted":
        order = rng.sample(range(tensor.dim()), tensor.dim())
        back = sorted(range(tensor.dim()), key=order.__getitem__)
        return tensor.permute(order).contiguous().permute(back)
    if way == "expanded" and tensor.dim() > 1 and tensor.numel():
        which = rng.randrange(tensor.dim() - 1)
        return tensor.narrow(which, 0, 1).expand(tensor.shape)
    return tensor


def relaid_alike(rng: random.Random, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same, but never with other values."""
    other = relaid(rng, tensor)
    return other if tensor is None or torch.equal(other, tensor) else tensor
