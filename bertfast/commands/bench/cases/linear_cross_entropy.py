"""loss = cross_entropy(hidden weight^T + bias, labels), as at the head of a masked language model.

A share of the tokens has a label. Stock torch makes logits of all, as Hugging Face's models do.
The gradients are made beside the loss, so both are timed together. Ours are told how many labels
there are, as who masks the tokens knows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ....ops import linear_cross_entropy
from ....ops.cross_entropy import chunks, limits
from ....testing import linear_cross_entropy as testing
from ..case import Step, normal
from ..floor import Work
from ..op_case import Inputs, OpCase
from ..predicted import Counts, Product
from ..providers import Provider

Tensor = torch.Tensor
SHARE = 0.15
IGNORED = -100
WORDS = 30522


def _ours(backend: str) -> Callable:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, labelled: int) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, labelled=labelled, backend=backend
        )

    return run


def _stock(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, labelled: int) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


def _liger(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, labelled: int) -> Tensor:
    """In chunks of rows too, of all rows."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels, bias)


def _cut(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, labelled: int) -> Tensor:
    """Products in the kernels. It leaves rows without a label out, too."""
    from cut_cross_entropy import linear_cross_entropy as cut

    return cut(hidden, weight, labels, bias=bias)


@dataclass(frozen=True)
class LinearCrossEntropyCase(OpCase):
    pass_: str  # forward, or forward+backward
    rows: int  # tokens
    width: int
    vocabulary: int
    dtype: torch.dtype

    op = "linear_cross_entropy"
    dropout = 0.0
    functions = {
        "bertfast": _ours,
        "torch eager": _stock,
        "Liger": _liger,
        "cut-cross-entropy": _cut,
    }

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}x{self.vocabulary}"

    @property
    def form(self) -> tuple:
        return self.dtype, self.vocabulary

    @property
    def labelled(self) -> int:
        return max(1, round(SHARE * self.rows))

    def work(self) -> list[Work]:
        """The products of the labelled rows, one or three; each reads or writes rows, weight and,
        but for the second, a value for each word, and no logits."""
        rows, width, words = self.labelled, self.width, self.vocabulary
        values = rows * width + words * width
        more = [words, 0, words] if self.pass_ == "forward+backward" else [words]
        flops = 2 * rows * width * words
        return [Work("products", flops, (values + one) * self.dtype.itemsize) for one in more]

    def counts(self, provider: Provider) -> Counts | None:
        """In bytes of a logit, beside products of 16-bit operands and results:

        triton        its float32, 2 more; read; and for gradients read again and dz written, with
                      partial sums of 1/32 a value, written and read
        torch eager   read, and its softmax's logarithm written; for gradients that one's gradient
                      written and read, the logarithm read, dz written, and read for its sum

        and of the weight's gradient, of triton: each chunk writes a product in float32 (2 more),
        which but for the first is added (12); then it is multiplied and rounded (6).
        """
        both = self.pass_ == "forward+backward"
        width, words = self.width, self.vocabulary
        if self.dtype.itemsize != 2 or provider.name not in ("bertfast triton", "torch eager"):
            return None
        stock = provider.name == "torch eager"
        rows = self.rows if stock else self.labelled
        products = [Product(rows, words, width, 0 if stock else rows * words)]
        if both:
            products += [Product(rows, width, words), Product(words, width, rows)]
        if stock:
            return Counts(9 if both else 3, (14 if both else 4) * rows * words, 2, tuple(products))
        wide = -(-words // limits.MULTIPLE) * limits.MULTIPLE
        parts = -(-rows // chunks.chunk_rows(wide, on_gpu=True))
        bytes_ = (10.25 if both else 4) * rows * words
        if both:
            # Products of further chunks write the weight's gradient again: 2 are counted of one.
            bytes_ += (2 + 6 + 16 * (parts - 1)) * words * width
        # Apart from a chunk's: places of the labels, and their rows, about a dozen.
        return Counts((8 if both else 2) * parts + 12, bytes_, 2, tuple(products))

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        leaves = {
            "hidden": values(self.rows, self.width),
            "weight": values(self.vocabulary, self.width) / self.width**0.5,
            "bias": values(self.vocabulary) * 0.1,
        }
        generator = torch.Generator().manual_seed(seed)
        labels = torch.full((self.rows,), IGNORED)
        places = torch.randperm(self.rows, generator=generator)[: self.labelled]
        labels[places] = torch.randint(self.vocabulary, (self.labelled,), generator=generator)
        more = {"labels": labels.to(device), "labelled": self.labelled}
        return Inputs(leaves, torch.ones((), device=device), more)

    def step(self, runner: Callable, inputs: Inputs) -> Step:
        if self.pass_ == "forward":
            return super().step(runner, inputs)
        call = functools.partial(runner, **inputs.more)
        leaves: dict[str, Any] = {
            k: v.detach().clone().requires_grad_() for k, v in inputs.leaves.items()
        }

        def both() -> tuple[Tensor, ...]:
            loss = call(**leaves)
            return loss.detach(), *torch.autograd.grad(loss, [*leaves.values()])

        return both

    def for_budget(self) -> testing.Case:
        return testing.Case(67, self.width, min(1100, self.vocabulary), share=0.5)


PASSES = ("forward+backward", "forward")


def gpu_cases() -> list[LinearCrossEntropyCase]:
    """BERT-base's head at a full batch in bf16, then outward."""
    bf16, fp16 = torch.bfloat16, torch.float16
    order = ((16384, 768, bf16), (65536, 768, bf16), (16384, 1024, bf16), (16384, 768, fp16))
    return [
        LinearCrossEntropyCase(pass_, rows, width, WORDS, dtype)
        for rows, width, dtype in order
        for pass_ in PASSES
    ]


def cpu_cases() -> list[LinearCrossEntropyCase]:
    """MiniLM's head."""
    return [LinearCrossEntropyCase(pass_, 512, 384, WORDS, torch.float32) for pass_ in PASSES]


def dry_cases() -> list[LinearCrossEntropyCase]:
    dtypes = (torch.bfloat16, torch.float16)
    return [
        LinearCrossEntropyCase(pass_, 20, 32, 50, dtype)
        for pass_, dtype in zip(PASSES, dtypes, strict=True)
    ]
