"""linear_log1p_max's cases, inputs and rounding model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..ops import linear_log1p_max
from .budget import UNIT_ROUNDOFF

NAMES = ("x", "weight", "bias")


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    width: int
    vocabulary: int
    layout: str = "masked"  # or padded, with all tokens; packed; holes: masked anywhere
    bias: bool = True

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths))
        return f"{lengths}x{self.width}x{self.vocabulary}-{self.layout}" + "-no-bias" * (
            not self.bias
        )


def quick_cases() -> list[Case]:
    """The cases of `bertfast verify`. Sequences without tokens; a vocabulary of one word."""
    return [
        Case((7, 12, 0, 1), 48, 90),
        Case((20, 20), 16, 130, "padded", bias=False),
        Case((40, 3, 0, 17, 17), 24, 70, "packed"),
        Case((9, 9, 9), 8, 1, "holes"),
    ]


def cases() -> list[Case]:
    """Lengths and vocabularies about those of a tile, too."""
    layouts = ("padded", "masked", "holes", "packed")
    sizes = [Case((length, 2), 16, 40, "packed") for length in (1, 31, 32, 33, 64, 65)]
    sizes += [Case((5, 9), 8, vocabulary) for vocabulary in (1, 2, 127, 129)]
    sizes += [Case((5, 9), width, 20, "packed") for width in (1, 15, 33, 100)]
    forms = [
        Case((6, 0, 11, 11), 24, 60, layout, bias) for layout in layouts for bias in (True, False)
    ]
    return [*quick_cases(), *sizes, *forms, Case((), 8, 20), Case((0, 0), 8, 20, "packed")]


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    """dy is 0 where a logit's rounding decides which token has the gradient, or whether there is
    one: where the two largest, or the largest and 0, are nearer than 2^-10. What lies in masked
    tokens is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    lengths = torch.tensor(case.lengths, dtype=torch.int64)
    longest = max(case.lengths, default=0)
    count, packed = len(case.lengths), case.layout == "packed"
    mask = torch.arange(longest) < lengths[:, None]
    if case.layout == "padded":
        mask = torch.ones_like(mask)
    elif case.layout == "holes":
        mask = torch.rand(mask.shape, generator=generator) < 0.6
    options: dict[str, Any] = {}
    x = normal(count, longest, case.width).to(dtype)
    weight = (normal(case.vocabulary, case.width) / case.width**0.5).to(dtype)
    bias = (normal(case.vocabulary) * 0.5).to(dtype) if case.bias else None
    logits = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    two = F.pad(logits.masked_fill(~mask[..., None], -9.0), (0, 0, 0, 2), value=-9.0)
    first, second = two.topk(2, 1).values.unbind(1)
    sure = (first - second > 2.0**-10) & (first.abs() > 2.0**-10)
    if packed:
        x = x[mask]
        bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        options = {"cu_seqlens": bounds, "max_seqlen": longest}
    elif case.layout != "padded":
        options = {"key_mask": mask}
        x = x.masked_fill(~mask[..., None], torch.nan)
    dy = (normal(count, case.vocabulary) * sure).to(dtype)
    return {"x": x, "weight": weight, "bias": bias, "dy": dy, "options": options, "mask": mask}


def run(
    inputs: dict,
    backend: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict:
    """Vectors and gradients by a backend."""
    options: dict[str, Any] = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs["options"].items()
    }

    def function(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return linear_log1p_max(x, weight, bias, **options, backend=backend)

    return _run(inputs, function, device, dtype)


def _run(inputs: dict, function: Callable, device: str, dtype: torch.dtype | None) -> dict:
    leaves = {
        name: inputs[name].to(device, dtype).detach().requires_grad_()
        for name in NAMES
        if inputs[name] is not None
    }
    y = function(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(device, y.dtype))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def oracle(inputs: dict) -> dict:
    """Autograd through all logits in float64, by torch's own functions."""
    return _by_autograd(inputs, torch.float64)


def plain_torch(inputs: dict) -> dict:
    """Results of stock torch in this dtype, with logits in it."""
    return _by_autograd(inputs, None)


def _padded(x: torch.Tensor, inputs: dict) -> torch.Tensor:
    """(sequences, length, width), with zeros where no token counts."""
    mask = inputs["mask"]
    rows = x if "cu_seqlens" in inputs["options"] else x[mask]
    return x.new_zeros((*mask.shape, x.shape[-1])).index_put((mask,), rows)


def _by_autograd(inputs: dict, dtype: torch.dtype | None) -> dict:
    def function(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits = F.linear(_padded(x, inputs), weight, bias)
        activated = torch.log1p(torch.relu(logits)) * inputs["mask"][..., None]
        # Of a row of zeros that is put before, max has no gradient that reaches anything.
        return F.pad(activated, (0, 0, 1, 0)).max(1).values

    return _run(inputs, function, "cpu", dtype)


def _entries(inputs: dict, compute: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The largest logits, relu'd, dlogit, both (sequences, words), and the tokens' one-hot
    (sequences, length, words)."""
    x, weight = _padded(inputs["x"], inputs).to(compute), inputs["weight"].to(compute)
    products = F.linear(x, weight).masked_fill(~inputs["mask"][..., None], -torch.inf)
    top, token = F.pad(products, (0, 0, 0, 1), value=-torch.inf).max(1)
    if inputs["bias"] is not None:
        top = top + inputs["bias"].to(compute)
    top = top.relu()
    dlogit = torch.where(top > 0, inputs["dy"].to(compute) / (1 + top), 0)
    one_hot = token[:, None] == torch.arange(products.shape[1])[:, None]
    return top, dlogit, one_hot


def rounding_model(
    inputs: dict,
    logits: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    token_sum: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda a, b: a @ b,
) -> dict:
    """float32 arithmetic, rounded at the outputs.

    logits and token_sum are the places where tests plant a precision fault.
    """
    dtype, packed = inputs["x"].dtype, "cu_seqlens" in inputs["options"]
    x, weight = _padded(inputs["x"], inputs).float(), inputs["weight"].float()
    top, _, one_hot = _entries(inputs, torch.float32)
    top = logits(top)
    dlogit = torch.where(top > 0, inputs["dy"].float() / (1 + top), 0)
    spread = one_hot * dlogit[:, None]
    dx = token_sum(spread, weight).to(dtype)
    out = {"y": torch.log1p(top).to(dtype), "dx": dx[inputs["mask"]] if packed else dx}
    out["dweight"] = torch.einsum("blv,blw->vw", spread, x).to(dtype)
    if inputs["bias"] is not None:
        out["dbias"] = dlogit.sum(0).to(dtype)
    return out


def scales(inputs: dict) -> dict:
    """Factors of the budget's u where they exceed |reference|.

    A logit is a sum of `width` products in float32, so 2^-24 sqrt(width) times the root of their
    squares' sum is left of it, and 2^-24 of itself: e, of which log1p leaves e / (1 + top), and so
    does dlogit in relation to itself. A gradient is a sum of n terms of either sign, one after the
    other: its partial sums' roundings are those of a walk, sqrt(n) times the root of the terms'
    squares' sum.
    """
    dtype, packed = inputs["x"].dtype, "cu_seqlens" in inputs["options"]
    rest = 2.0**-24 / UNIT_ROUNDOFF[dtype]
    x, weight = _padded(inputs["x"], inputs).double(), inputs["weight"].double()
    top, dlogit, one_hot = _entries(inputs, torch.float64)
    squares = (one_hot * F.linear(x.square(), weight.square())).sum(1)
    left = (squares.sqrt() * x.shape[-1] ** 0.5 + top) / (1 + top)
    exact = oracle(inputs)
    out = {"y": exact["y"].abs() + left * rest}

    # Squares of what an entry leaves in a sum of so many.
    alone = (dlogit * rest).square()
    terms = one_hot.sum(2, keepdim=True)  # of a token
    for_tokens = one_hot * alone[:, None] * (1 + left[:, None] + terms.sqrt()).square()
    for_words = alone * (1 + left + len(top) ** 0.5).square()
    dx = (for_tokens @ weight.square()).sqrt()
    out["dx"] = exact["dx"].abs() + (dx[inputs["mask"]] if packed else dx)
    of_weight = torch.einsum("blv,blw->vw", one_hot * for_words[:, None], x.square()).sqrt()
    out["dweight"] = exact["dweight"].abs() + of_weight
    if inputs["bias"] is not None:
        out["dbias"] = exact["dbias"].abs() + for_words.sum(0).sqrt()
    return out
