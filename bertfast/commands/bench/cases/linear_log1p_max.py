"""y = max over a sequence's tokens of log1p(relu(x weight^T + bias)): SPLADE's vectors.

A full batch without padding. Stock torch makes logits of all tokens, as
sentence-transformers does. Only the forward is timed: where logits are rounded to 16 bits, rounding
decides which token has the gradient, so that there are no right numbers to hold both to.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ....ops import linear_log1p_max
from ....ops.log1p_max import chunks, limits
from ....testing import linear_log1p_max as testing
from ..case import normal
from ..floor import Work
from ..op_case import Inputs, OpCase
from ..predicted import Counts, Product
from ..providers import Provider

Tensor = torch.Tensor
WORDS = 30522


def _ours(backend: str) -> Callable:
    return functools.partial(linear_log1p_max, backend=backend)


def _stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.log1p(torch.relu(F.linear(x, weight, bias))).max(1).values


@dataclass(frozen=True)
class LinearLog1pMaxCase(OpCase):
    pass_: str  # forward
    sequences: int
    length: int
    width: int
    vocabulary: int
    dtype: torch.dtype

    op = "linear_log1p_max"
    dropout = 0.0
    functions = {"bertfast": _ours, "torch eager": _stock}

    @property
    def shape(self) -> str:
        return f"{self.sequences}x{self.length}x{self.width}x{self.vocabulary}"

    @property
    def form(self) -> tuple:
        return self.dtype, self.vocabulary

    def work(self) -> list[Work]:
        """The product, which reads tokens and weight and writes a value for each sequence and
        word."""
        tokens, width, words = self.sequences * self.length, self.width, self.vocabulary
        entries = self.sequences * words
        bytes_ = (tokens * width + words * width + entries) * self.dtype.itemsize
        return [Work("products", 2 * tokens * width * words, bytes_)]

    def counts(self, provider: Provider) -> Counts | None:
        """In bytes of a logit in 16 bits:

        triton        its float32, 2 more than the product writes; read
        torch eager   relu, log1p: read and written; read for the largest
        """
        if self.dtype.itemsize != 2:
            return None
        tokens, width, words = self.sequences * self.length, self.width, self.vocabulary
        logits = tokens * words
        if provider.name == "torch eager":
            return Counts(4, 10 * logits, 2, (Product(tokens, words, width),))
        if provider.name != "bertfast triton":
            return None
        wide = -(-words // limits.MULTIPLE) * limits.MULTIPLE
        parts = -(-wide // min(wide, chunks.chunk_words(tokens, on_gpu=True)))
        # Each part is a product and the kernel; top and token are made before, and the rest after.
        return Counts(2 * parts + 6, 4 * logits, 2, (Product(tokens, words, width, logits),))

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        leaves = {
            "x": values(self.sequences, self.length, self.width),
            "weight": values(self.vocabulary, self.width) / self.width**0.5,
            "bias": values(self.vocabulary) * 0.1,
        }
        return Inputs(leaves, values(self.sequences, self.vocabulary))

    def for_budget(self) -> testing.Case:
        return testing.Case((20, 3), self.width, min(300, self.vocabulary))


def gpu_cases() -> list[LinearLog1pMaxCase]:
    """BERT-base's head at a full batch of texts, and at one of passages."""
    order = ((128, 128, torch.bfloat16), (32, 512, torch.bfloat16), (32, 512, torch.float16))
    return [
        LinearLog1pMaxCase("forward", sequences, length, 768, WORDS, dtype)
        for sequences, length, dtype in order
    ]


def cpu_cases() -> list[LinearLog1pMaxCase]:
    """MiniLM's width."""
    return [LinearLog1pMaxCase("forward", 8, 64, 384, WORDS, torch.float32)]


def dry_cases() -> list[LinearLog1pMaxCase]:
    return [LinearLog1pMaxCase("forward", 2, 10, 32, 50, torch.bfloat16)]
