"""linear_cross_entropy's cases, inputs and rounding model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..ops import linear_cross_entropy
from .budget import UNIT_ROUNDOFF

NAMES = ("hidden", "weight", "bias")
IGNORED = -100


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    vocabulary: int
    share: float = 0.3  # of rows that have a label
    bias: bool = True
    reduction: str = "mean"
    smoothing: float = 0.0
    sure: bool = False  # large logits: a row's probabilities are nearly 0 and 1

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.width}x{self.vocabulary}", f"{self.share:g}", self.reduction]
        words += [] if self.bias else ["no bias"]
        words += [f"smoothed {self.smoothing:g}"] if self.smoothing else []
        words += ["sure"] if self.sure else []
        return "-".join(words).replace(" ", "-")


def quick_cases() -> list[Case]:
    """The cases of `bertfast verify`. A vocabulary of one word; some that end within a tile."""
    return [
        Case(40, 48, 90, share=0.5),
        Case(5, 8, 1, reduction="sum"),
        Case(5, 24, 1100, share=1.0, reduction="none", smoothing=0.1),
        Case(30, 32, 400, bias=False, smoothing=0.1),
        Case(20, 32, 400, sure=True),
    ]


def cases() -> list[Case]:
    """More rows than a chunk has too."""
    sizes = [Case(rows, 16, 50) for rows in (1, 2, 64, 65, 200)]
    sizes += [Case(21, 8, vocabulary) for vocabulary in (1, 2, 3, 127, 1000)]
    forms = [
        Case(30, 24, 90, bias=bias, reduction=reduction, smoothing=smoothing)
        for bias in (True, False)
        for reduction in ("mean", "sum", "none")
        for smoothing in (0.0, 0.1)
    ]
    shares = [Case(150, 16, 40, share=share, reduction="sum") for share in (0.02, 0.15, 1.0)]
    return [*sizes, *forms, *shares, Case(50, 32, 400, sure=True), Case(300, 64, 500, share=0.9)]


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    labels = torch.randint(0, case.vocabulary, (case.rows,), generator=generator)
    counted = torch.rand(case.rows, generator=generator) < case.share
    counted[0] = True
    size = 8.0 if case.sure else 1.0
    return {
        "hidden": (normal(case.rows, case.width) * size).to(dtype),
        "weight": (normal(case.vocabulary, case.width) / case.width**0.5).to(dtype),
        "bias": (normal(case.vocabulary) * 0.5).to(dtype) if case.bias else None,
        "labels": labels.where(counted, IGNORED),
        "dy": normal(case.rows) if case.reduction == "none" else torch.tensor(1.5),
        "options": dict(
            ignore_index=IGNORED, reduction=case.reduction, label_smoothing=case.smoothing
        ),
    }


def run(
    inputs: dict,
    backend: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict:
    """Loss and gradients by a backend."""
    leaves = {
        name: inputs[name].to(device, dtype).detach().requires_grad_()
        for name in NAMES
        if inputs[name] is not None
    }
    labels = inputs["labels"].to(device)
    options = inputs["options"] | {"backend": backend, "labelled": inputs.get("labelled")}
    loss = linear_cross_entropy(**leaves, labels=labels, **options)
    grads = torch.autograd.grad(loss, list(leaves.values()), inputs["dy"].to(device, loss.dtype))
    return {"loss": loss.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def oracle(inputs: dict) -> dict:
    """Autograd through all logits in float64, by torch's own functions."""
    return _by_autograd(inputs, torch.float64)


def plain_torch(inputs: dict) -> dict:
    """Results of stock torch in this dtype, with logits in it."""
    return _by_autograd(inputs, None)


def _by_autograd(inputs: dict, dtype: torch.dtype | None) -> dict:
    leaves = {
        name: inputs[name].to(dtype).detach().requires_grad_()
        for name in NAMES
        if inputs[name] is not None
    }
    logits = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    loss = F.cross_entropy(logits, inputs["labels"], **inputs["options"])
    grads = torch.autograd.grad(loss, list(leaves.values()), inputs["dy"].to(loss.dtype))
    return {"loss": loss.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def _dlogits(inputs: dict, compute: torch.dtype) -> torch.Tensor:
    hidden, weight = inputs["hidden"].to(compute), inputs["weight"].to(compute)
    bias = None if inputs["bias"] is None else inputs["bias"].to(compute)
    logits = F.linear(hidden, weight, bias).requires_grad_()
    loss = F.cross_entropy(logits, inputs["labels"], **inputs["options"])
    return torch.autograd.grad(loss, logits, inputs["dy"].to(loss.dtype))[0]


def rounding_model(
    inputs: dict,
    dlogits: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    weight_sum: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda a, b: a.t() @ b,
) -> dict:
    """float32 arithmetic, rounded where the algorithm must: dz as an operand, and the outputs.

    dlogits and weight_sum are the places where tests plant a precision fault.
    """
    dtype = inputs["hidden"].dtype
    out = {"loss": _by_autograd(inputs, torch.float32)["loss"]}
    dz = dlogits(_dlogits(inputs, torch.float32))
    rounded = dz.to(dtype).float()
    out["dhidden"] = (rounded @ inputs["weight"].float()).to(dtype)
    out["dweight"] = weight_sum(rounded, inputs["hidden"].float()).to(dtype)
    if inputs["bias"] is not None:
        out["dbias"] = dz.sum(0).to(dtype)
    return out


def scales(inputs: dict) -> dict:
    """Factors of the budget's u where they exceed |reference|.

    A logit is a sum of `width` products in float32, so 2^-24 sqrt(width) times the root of their
    squares' sum is left of it (in units of u: that times 2^-24 / u): e. The loss is a logit less a
    mean of logits, and a probability p errs by p (e + mean of e). Through the products that follow
    errors of rows, or of the vocabulary, are independent, and so are the roundings of dz itself,
    one 2^-24 of each.
    """
    dtype = inputs["hidden"].dtype
    d = {n: inputs[n].double() for n in NAMES if inputs[n] is not None}
    squares = (d["hidden"].square() @ d["weight"].square().t()).sqrt()
    logits = F.linear(d["hidden"], d["weight"], d.get("bias"))
    left = squares * d["hidden"].shape[1] ** 0.5 + logits.abs()
    p = logits.softmax(1)
    exact, dz = oracle(inputs), _dlogits(inputs, torch.float64)
    counted = inputs["labels"] != IGNORED
    size = torch.zeros(len(p), dtype=torch.float64)
    size[counted] = 1.0
    if inputs["options"]["reduction"] == "mean":
        size /= counted.sum()
    mean = (p * left).sum(1)
    rows = (left.amax(1) + mean) * size
    out = {"loss": exact["loss"].abs() + (rows if exact["loss"].ndim else rows.sum())}
    rest = 2.0**-24 / UNIT_ROUNDOFF[dtype]
    weighting = inputs["dy"].double() * size
    of_dz = (p * (left + mean[:, None]) * weighting[:, None].abs() + dz.abs()) * rest
    out["dhidden"] = exact["dhidden"].abs() + (of_dz.square() @ d["weight"].square()).sqrt()
    out["dweight"] = exact["dweight"].abs() + (of_dz.square().t() @ d["hidden"].square()).sqrt()
    if inputs["bias"] is not None:
        out["dbias"] = exact["dbias"].abs() + of_dz.square().sum(0).sqrt()
    return out
