"""Random numbers that are a pure function of where they are drawn: no state has to be saved.

Each place (an epoch's order, a window's sequences, a micro-batch's masks) has a stream of its own,
Philox keyed by the seed, its counter starting at the place. All is made of the raw 64 bits, which
numpy keeps the same from version to version, as it doesn't those of its distributions.
"""

import numpy as np

ORDER, SEQUENCES, MASKS = range(3)  # purposes that draw at the same place


class Draws:
    def __init__(self, seed: int, purpose: int, epoch: int, number: int) -> None:
        key = np.array([seed, purpose], np.uint64)
        # The lower half counts the numbers drawn.
        self._bits = np.random.Philox(
            key=key, counter=np.array([0, 0, number, epoch], np.uint64)
        ).random_raw

    def raw(self, count: int) -> np.ndarray:
        """uint64 (count,)."""
        return self._bits(count)

    def uniform(self, count: int) -> np.ndarray:
        """float64 (count,), from 0 to below 1."""
        return (self.raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, bounds: np.ndarray) -> np.ndarray:
        """int64, each from 0 to below its bound, which is between 1 and 2**31."""
        return (
            (self.raw(len(bounds)) >> np.uint64(32)) * bounds.astype(np.uint64) >> np.uint64(32)
        ).astype(np.int64)

    def permutation(self, count: int) -> np.ndarray:
        return np.argsort(self.raw(count), kind="stable")
