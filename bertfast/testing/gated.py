"""gated's cases, inputs and rounding model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ops import gated
from ..ops.gated.limits import ACTIVATIONS
from ..ops.gated.reference import act
from .layouts import lay_out

NAMES = ("x", "bias")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]  # of the output
    bias: bool = False
    activation: str = "gelu"
    activated: str = "first"
    values: str = "normal"  # or "wide", "large", "tiny", "tail" (of the activation), "zero"
    layout: str = "contiguous"  # or "rows apart", "transposed", "strided"

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), self.activation]
        words += ["bias"] if self.bias else []
        words += ["second"] if self.activated == "second" else []
        words += [w for w in (self.values, self.layout) if w not in ("normal", "contiguous")]
        return "-".join(words).replace(" ", "-")


def quick_cases() -> list[Case]:
    """The cases of `bertfast verify`: an encoder's width, every feature, the hostile values."""
    return [
        Case((3, 7, 1152)),
        Case((5, 384), bias=True, activation="silu", activated="second"),
        Case((3, 3, 257), activation="gelu_tanh", values="wide"),
        Case((33, 40), bias=True, values="tail"),
        Case((33, 40), activation="silu", values="tail"),
        Case((7, 33), activated="second", layout="rows apart"),
    ]


def cases() -> list[Case]:
    plain = [
        Case((2, 3, 384), bias, activation, activated)
        for bias in (False, True)
        for activation in ACTIVATIONS
        for activated in ("first", "second")
    ]
    widths = [
        Case((3, width), width % 2 == 0, ACTIVATIONS[place % 3], ("first", "second")[width % 2])
        for place, width in enumerate((1, 2, 7, 8, 33, 257, 1024, 1032, 1152))
    ]
    rows = [
        Case((384,), bias=True),
        Case((300, 5), bias=True, activation="silu"),
        Case((67, 256), bias=True),
        Case((0, 64), bias=True),
        Case((2, 0), bias=True),
        Case((2, 3, 5, 64), activation="silu"),
    ]
    values = [
        Case((9, 257), activation == "gelu", activation, values=kind)
        for kind in ("wide", "large", "tiny", "tail", "zero")
        for activation in ACTIVATIONS
    ]
    layouts = [
        Case((2, 3, 192), bias, activated="second", layout=layout)
        for layout in ("rows apart", "transposed", "strided")
        for bias in (True, False)
    ]
    return plain + widths + rows + values + layouts


# "large": products of two, and of three in the backward, stay below float16's largest value.
_SCALES = {"wide": 4.0, "large": 20.0, "tiny": 1e-2, "zero": 0.0}


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * _SCALES.get(case.values, 1.0)

    u, v = normal(*case.shape), normal(*case.shape)
    if case.values == "tail":
        u = -3.0 - u.abs()
    halves = (u, v) if case.activated == "first" else (v, u)
    bias = None
    if case.bias:
        bias = (normal(2 * case.shape[-1]) * 0.1).to(dtype)
    dy = torch.randn(case.shape, generator=generator).to(dtype)
    return {
        "x": lay_out(torch.cat(halves, -1).to(dtype), case.layout),
        "bias": bias,
        "dy": lay_out(dy, case.layout),
        "activation": case.activation,
        "activated": case.activated,
    }


def _run(inputs: dict, function: Callable, device: str, dtype: torch.dtype | None) -> dict:
    leaves = {
        name: inputs[name].to(device, dtype).detach().requires_grad_()
        for name in NAMES
        if inputs[name] is not None
    }
    y = function(**leaves, activation=inputs["activation"], activated=inputs["activated"])
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(device, dtype))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def run(inputs: dict, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> dict:
    """Output and gradients by a backend. dtype=torch.float64 with "torch" is the oracle."""

    def function(**arguments: object) -> torch.Tensor:
        return gated(**arguments, backend=backend)  # type: ignore[arg-type]

    return _run(inputs, function, device, dtype)


def oracle(inputs: dict) -> dict:
    return run(inputs, "torch", dtype=torch.float64)


def _halves(x: torch.Tensor, activated: str) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = x.chunk(2, -1)
    return (first, second) if activated == "first" else (second, first)


def _wide(inputs: dict) -> torch.Tensor:
    x = inputs["x"].float()
    return x if inputs["bias"] is None else x + inputs["bias"].float()


def _column_sum(terms: torch.Tensor) -> torch.Tensor:
    return terms.sum(0)


def rounding_model(
    inputs: dict,
    activation: str | None = None,
    column_sum: Callable[[torch.Tensor], torch.Tensor] = _column_sum,
    store: Callable[[torch.Tensor], torch.Tensor] = lambda a: a,
) -> dict:
    """The reference in float32, rounded at the outputs and nowhere else.

    activation, column_sum and store (of act(u)) are the places where tests plant a fault.
    """
    x = _wide(inputs).requires_grad_()
    u, v = _halves(x, inputs["activated"])
    y = store(act(u, activation or inputs["activation"])) * v
    (dx,) = torch.autograd.grad(y, x, inputs["dy"].float())
    dtype = inputs["x"].dtype
    out = {"y": y.detach().to(dtype), "dx": dx.to(dtype)}
    if inputs["bias"] is not None:
        out["dbias"] = column_sum(dx.reshape(_rows(dx))).to(dtype)
    return out


def _rows(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // max(1, x.shape[-1]), x.shape[-1]


def scales(inputs: dict) -> dict:
    """Factors of the budget's u where they exceed |reference|: of SiLU in its tail.

    The kernels make the sigmoid at -z, z = |u|, of exp2(-z log2(e)), where torch's GELU, the
    yardstick of the other activations, cancels. Relative to that sigmoid s, rounding the argument
    and its constant errs by up to 1.25 z units of 2^-24, and a GPU's ex2.approx by 4 (2^-22, says
    the PTX manual). Half of that counts, as the budget doubles it. It is part of silu's value by
    z s, and of its slope by s + z s r, r = 1 - s. In 16 bits a unit is far below u.
    """
    if inputs["activation"] != "silu":
        return {}
    reference = oracle(inputs)
    wide = inputs["x"].double()
    if inputs["bias"] is not None:
        wide = wide + inputs["bias"].double()
    u, v = _halves(wide, inputs["activated"])
    dy, z = inputs["dy"].double(), u.abs()
    unit = {torch.float32: 1.0, torch.float16: 2.0**-13, torch.bfloat16: 2.0**-16}
    err = (2 + 0.625 * z) * torch.sigmoid(-z) * unit[inputs["x"].dtype]
    slope = err * (1 + z * torch.sigmoid(z))
    du, dv = (dy * v * slope).abs(), (dy * z * err).abs()
    more = torch.cat((du, dv) if inputs["activated"] == "first" else (dv, du), -1)
    found = {
        "y": reference["y"].abs() + (z * err * v).abs(),
        "dx": reference["dx"].abs() + more,
    }
    if "dbias" in reference:
        found["dbias"] = reference["dbias"].abs() + more.reshape(_rows(more)).sum(0)
    return found


def _stock(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "gelu",
    activated: str = "first",
) -> torch.Tensor:
    u, v = _halves(x if bias is None else x + bias, activated)
    return act(u, activation) * v


def plain_torch(inputs: dict) -> dict:
    """Results of stock torch in this dtype: one op after the other, each rounding."""
    return _run(inputs, _stock, "cpu", None)
