"""A mask as the host sees it: which tokens are attended, and where they go in the packed batch.

By numpy, whatever device the mask is on: its values come in one copy, which is waited for, and the
places go back in one. On the device the same would be a score of small kernels.
"""

from typing import NamedTuple

import numpy as np
import torch


class Padding(NamedTuple):
    """The batch's token ids, of the mask's shape, and the one that is padding."""

    ids: torch.Tensor
    token: int


def look(mask: torch.Tensor, padding: Padding | None) -> tuple[np.ndarray, bool]:
    """The tokens that are attended, bool (rows, length), and True if another is not padding."""
    if padding is None:
        return _values(mask), False
    ids = padding.ids
    if mask.device == ids.device != torch.device("cpu"):
        # An id of a mask's type might be rounded, a mask of an id's cut off.
        if mask.dtype != ids.dtype:
            mask = mask.bool().to(ids.dtype)
        both = torch.stack((mask, ids)).cpu().numpy()
        attended, others = both[0] != 0, both[1]
    else:
        attended = _values(mask)
        if attended.all():
            return attended, False
        others = ids.cpu().numpy()
    return attended, bool(((others != padding.token) > attended).any())  # and not attended


def _values(mask: torch.Tensor) -> np.ndarray:
    return mask.detach().bool().cpu().numpy()


class Places(NamedTuple):
    """numbers, int64, of `sizes`: where each packed token stands in the padded batch, where in its
    row, and, if wanted, the packed token that comes back to each place of the padded batch."""

    numbers: np.ndarray
    sizes: list[int]
    firsts: np.ndarray  # where each row's first token stands in the packed batch


def places_of(
    attended: np.ndarray, lengths: np.ndarray, order: np.ndarray | None, wants_sources: bool
) -> Places:
    """lengths: of the rows. order: of the rows in the packed batch, if it isn't theirs. A place
    whose token was taken out gets its row's first token."""
    rows, length = attended.shape
    tokens = int(lengths.sum())
    sizes = [tokens, tokens, *([rows * length] if wants_sources else ())]
    numbers = np.empty(sum(sizes), dtype=np.int64)
    index = numbers[:tokens]
    if order is None:
        index[:] = np.flatnonzero(attended)
        firsts = np.cumsum(lengths) - lengths
    else:
        row, column = attended[order].nonzero()
        index[:] = order[row] * length + column
        firsts = np.empty(rows, dtype=np.int64)
        firsts[order] = np.cumsum(lengths[order]) - lengths[order]
    # Where each token's row begins in the padded batch.
    begins, counts = np.arange(rows) * length, lengths
    if order is not None:
        begins, counts = begins[order], lengths[order]
    np.subtract(index, np.repeat(begins, counts), out=numbers[tokens : 2 * tokens])
    if wants_sources:
        sources = numbers[2 * tokens :]
        sources.reshape(rows, length)[:] = firsts[:, None]
        sources[index] = np.arange(tokens)
    return Places(numbers, sizes, firsts)
