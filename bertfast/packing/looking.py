"""A mask as the host sees it: which tokens are attended, and where they go in the packed batch.

The mask's values come in one copy, which is waited for, and the places go back in one: on the
device the same would be a score of small kernels. Between the copies a compiled module counts, if
one was built (csrc/bindings/mask.cpp), and numpy elsewhere.
"""

from typing import NamedTuple

import numpy as np
import torch

from .compiled import module


class Padding(NamedTuple):
    """The batch's token ids, of the mask's shape, and the one that is padding."""

    ids: torch.Tensor
    token: int


class Seen(NamedTuple):
    attended: np.ndarray  # (rows, length), bool or int64: not 0
    lengths: np.ndarray  # int64, attended tokens of each row
    begins: bool  # each row's first token is attended
    to_be_read: bool  # a token that isn't attended is not the padding


def look(mask: torch.Tensor, padding: Padding | None) -> Seen:
    """padding: None where all that isn't attended is taken for it."""
    if padding is None:
        return seen(_values(mask), None, 0)
    ids = padding.ids
    if mask.device == ids.device != torch.device("cpu"):
        # An id of a mask's type might be rounded, a mask of an id's cut off.
        if mask.dtype != ids.dtype:
            mask = mask.bool().to(ids.dtype)
        attended, others = torch.stack((mask, ids)).cpu().numpy()
        return seen(attended, others, padding.token)
    attended = _values(mask)
    if attended.all():  # then nobody has to wait for ids
        return seen(attended, None, 0)
    return seen(attended, ids.cpu().numpy(), padding.token)


def _values(mask: torch.Tensor) -> np.ndarray:
    return mask.detach().bool().cpu().numpy()


def seen(attended: np.ndarray, ids: np.ndarray | None, token: int) -> Seen:
    attended = np.ascontiguousarray(attended, None if attended.dtype == bool else np.int64)
    ids = None if ids is None else np.ascontiguousarray(ids, np.int64)
    compiled = module()
    if compiled is not None:
        return Seen(attended, *compiled.look(attended, ids, token))
    attended = attended != 0
    lengths = np.count_nonzero(attended, axis=1)
    begins = attended.shape[1] > 0 and bool(attended[:, 0].all())
    read = ids is not None and bool(((ids != token) > attended).any())  # and not attended
    return Seen(attended, lengths, begins, read)


class Places(NamedTuple):
    """numbers, int64, of `sizes`: where each packed token stands in the padded batch, where in its
    row, and, if wanted, the packed token that comes back to each place of the padded batch."""

    numbers: np.ndarray
    sizes: list[int]


def places_of(
    attended: np.ndarray, lengths: np.ndarray, order: np.ndarray | None, wants_sources: bool
) -> Places:
    """lengths: of the rows. order: of the rows in the packed batch, if it isn't theirs. A place
    whose token was taken out gets its row's first token."""
    rows, length = attended.shape
    tokens = int(lengths.sum())
    sizes = [tokens, tokens, *([rows * length] if wants_sources else ())]
    compiled = module()
    if order is None and compiled is not None:
        return Places(compiled.places(attended, tokens, wants_sources), sizes)
    numbers = np.empty(sum(sizes), dtype=np.int64)
    index = numbers[:tokens]
    begins, counts = np.arange(rows) * length, lengths
    if order is None:
        index[:] = np.flatnonzero(attended)
    else:
        begins, counts = begins[order], lengths[order]
        row, column = attended[order].nonzero()
        index[:] = order[row] * length + column
    np.subtract(index, np.repeat(begins, counts), out=numbers[tokens : 2 * tokens])
    if wants_sources:
        sources = numbers[2 * tokens :]
        sources.reshape(rows, length)[:] = firsts_of(lengths, order)[:, None]
        sources[index] = np.arange(tokens)
    return Places(numbers, sizes)


def firsts_of(lengths: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Places of the rows' first tokens in the packed batch."""
    if order is None:
        return np.cumsum(lengths) - lengths
    firsts = np.empty(len(lengths), dtype=np.int64)
    firsts[order] = np.cumsum(lengths[order]) - lengths[order]
    return firsts
