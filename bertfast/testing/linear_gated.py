"""linear_gated's cases, inputs and rounding model.

Forward and backward are two calls on inputs of their own, as a layer's node makes them: u of the
backward is given, so that its budget knows nothing of the forward's rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ops.gated.limits import ACTIVATIONS
from ..ops.gated.reference import act
from ..ops.linear.run import Choice
from ..ops.linear_gated import reference
from ..ops.linear_gated.run import backward, forward
from .budget import UNIT_ROUNDOFF
from .layouts import rows_apart

FLOATS = ("x", "weight", "bias", "dy", "down", "u")
MOST_SLOPE = 1.13  # of each activation


@dataclass(frozen=True)
class Case:
    rows: int
    inputs: int  # of the forward's product, and outputs of the one whose gradient is given
    width: int  # of y
    bias: bool = True
    activation: str = "gelu"
    values: str = "normal"  # or "wide", "tail" (of the activation), "cancelling", "zero"
    layout: str = "contiguous"  # or "rows apart", "shifted": x and dy, and the weights
    kernels: int = 1  # 2: a product of torch's and the backend's gated

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.inputs}x{self.width}", self.activation]
        words += [] if self.bias else ["no bias"]
        words += ["two kernels"] if self.kernels == 2 else []
        words += [w for w in (self.values, self.layout) if w not in ("normal", "contiguous")]
        return "-".join(words).replace(" ", "-")


def quick_cases() -> list[Case]:
    """The cases of `bertfast verify`: ragged in each size, more than one tile, every feature."""
    return [
        Case(70, 96, 104),
        Case(1, 8, 8, activation="gelu_tanh"),
        Case(130, 72, 72, bias=False, activation="silu"),
        Case(33, 264, 40, values="tail"),
        Case(17, 40, 72, activation="silu", layout="rows apart"),
        Case(100, 72, 136, kernels=2),
    ]


def gpu_cases() -> list[Case]:
    """More tiles of 128 x 64 than a kernel that stays for many of them asks for."""
    return [Case(1030, 200, 520)]


def cases() -> list[Case]:
    """Sizes around the tiles of the kernels, 32 to 256."""
    rows = [Case(rows, 64, 64) for rows in (0, 1, 2, 16, 17, 63, 64, 65, 127, 129, 257)]
    inputs = [Case(19, inputs, 48) for inputs in (8, 16, 24, 40, 72, 136, 264, 520)]
    widths = [Case(21, 48, width) for width in (8, 16, 24, 56, 72, 120, 136, 248, 264)]
    features = [
        Case(37, 72, 88, bias=bias, activation=activation)
        for bias in (True, False)
        for activation in ACTIVATIONS
    ]
    values = [
        Case(40, 72, 136, values=kind, activation=activation)
        for kind in ("wide", "tail", "cancelling", "zero")
        for activation in ACTIVATIONS
    ]
    split = [
        Case(rows, 40, 72, kernels=2, activation=a)
        for rows, a in ((1, "gelu"), (133, "silu"), (133, "gelu_tanh"))
    ]
    layouts = [Case(37, 40, 72, layout=layout) for layout in ("rows apart", "shifted")]
    return [*rows, *inputs, *widths, *features, *values, *layouts, *split, Case(200, 128, 200)]


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    size = {"wide": 4.0, "zero": 0.0}.get(case.values, 1.0)
    wide = 2 * case.width
    x, dy = normal(case.rows, case.inputs) * size, normal(case.rows, case.inputs)
    weight = normal(wide, case.inputs) / case.inputs**0.5
    down = normal(case.inputs, case.width) / case.inputs**0.5
    bias, u = normal(wide) * 0.1, normal(case.rows, wide) * size
    if case.values == "tail":
        bias[: case.width] -= 4.0
        u[:, : case.width] -= 4.0
    if case.values == "cancelling":  # pairs of large products that nearly cancel
        x[:, 1::2], dy[:, 1::2] = -x[:, ::2] * 50, -dy[:, ::2] * 50
        x[:, ::2], dy[:, ::2] = x[:, ::2] * 50, dy[:, ::2] * 50
        weight[:, 1::2] = weight[:, ::2] + weight[:, 1::2] / 100
        down[1::2] = down[::2] + down[1::2] / 100
    apart = case.layout
    return {
        "x": rows_apart(x.to(dtype), apart),
        "weight": rows_apart(weight.to(dtype), apart),
        "bias": bias.to(dtype) if case.bias else None,
        "dy": rows_apart(dy.to(dtype), apart),
        "down": rows_apart(down.to(dtype), apart),
        "u": u.to(dtype),
        "activation": case.activation,
        "kernels": case.kernels,
    }


def _as(dtype: torch.dtype, inputs: dict, device: str = "cpu") -> dict:
    moved = {name: inputs[name].to(device, dtype) for name in FLOATS if inputs[name] is not None}
    return inputs | moved


def run(inputs: dict, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> dict:
    """Both calls by a backend. dtype=torch.float64 with "torch" is the oracle."""
    i = _as(dtype or inputs["x"].dtype, inputs, device) if device != "cpu" or dtype else inputs
    biased = i["bias"] is not None
    if backend == "torch":
        y = reference.forward(i["x"], i["weight"], i["bias"], i["activation"])
        out = {"y": y, "u": (i["x"] @ i["weight"].t())}
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        out["du"], summed = _derivative(i, compute)
        return out | {"dbias": summed} if biased else out
    y, u = up(inputs, backend, device)
    constants = i["activation"], biased, _choice(inputs, backend)
    made = backward(i["dy"], i["down"], i["u"], i["bias"], *constants)
    found = zip(("y", "u", "du", "dbias"), (y, u, *made), strict=True)
    return {name: value for name, value in found if value is not None}


def _choice(inputs: dict, backend: str) -> Choice:
    return Choice(backend) if inputs["kernels"] == 2 else Choice(backend, backend, backend)


def up(
    inputs: dict, backend: str, device: str = "cpu", save: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The forward alone: y and, if it is to be saved, u."""
    i = _as(inputs["x"].dtype, inputs, device) if device != "cpu" else inputs
    choice = _choice(inputs, backend)
    return forward(i["x"], i["weight"], i["bias"], i["activation"], choice, save)


def _column_sum(terms: torch.Tensor) -> torch.Tensor:
    return terms.sum(0)


def _gated(
    u: torch.Tensor, bias: torch.Tensor | None, activation: str, compute: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """u + bias, and y of it, not rounded."""
    both = u.to(compute)
    if bias is not None:
        both = both + bias.to(compute)
    both.requires_grad_()
    gate, value = both.chunk(2, -1)
    return both, act(gate, activation) * value


def _derivative(
    i: dict,
    compute: torch.dtype,
    column_sum: Callable[[torch.Tensor], torch.Tensor] = _column_sum,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """du and dbias by torch, rounded once."""
    dtype = i["dy"].dtype
    dh = i["dy"].to(compute) @ i["down"].to(compute)
    if i["kernels"] == 2:
        dh = dh.to(dtype).to(compute)
    both, y = _gated(i["u"], i["bias"], activation or i["activation"], compute)
    (du,) = torch.autograd.grad(y, both, dh)
    return du.to(dtype), column_sum(du).to(dtype)


def oracle(inputs: dict) -> dict:
    return run(inputs, "torch", dtype=torch.float64)


def rounding_model(
    inputs: dict,
    activation: str | None = None,
    column_sum: Callable[[torch.Tensor], torch.Tensor] = _column_sum,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul,
) -> dict:
    """float32 arithmetic, rounded where the algorithm must: u as it is saved, and the outputs;
    between two kernels also dy down, whose rounding errors dbias adds up over the rows.

    activation, column_sum and product are the places where tests plant a precision fault.
    """
    dtype, f = inputs["x"].dtype, _as(torch.float32, inputs)
    u = product(f["x"], f["weight"].t()).to(dtype)
    _, y = _gated(u, inputs["bias"], activation or inputs["activation"], torch.float32)
    du, dbias = _derivative(inputs, torch.float32, column_sum, activation)
    out = {"y": y.detach().to(dtype), "u": u, "du": du}
    return out if inputs["bias"] is None else out | {"dbias": dbias}


def scales(inputs: dict) -> dict:
    """Factors of the budget's u where they exceed |reference|.

    A product of which much cancels keeps 2^-24 of the sizes of its terms for each partial sum that
    was rounded: in units of u sqrt(inputs) * (2^-24 / u) times the sizes' root mean square, as in
    linear_gelu's table. Call that of the forward's product e, of both halves, and of the backward's
    f. Errors of gate and value are independent, so y has e of the gate times the value's size and
    the slope, at most MOST_SLOPE, and e of the value times act. du has f times the same two
    factors. dbias: rows' errors are independent, and each row's value is rounded into a float32
    sum. SiLU's tail, which gated's table allows more of float32, lies far below u in 16 bits.
    """
    d = _as(torch.float64, inputs)
    rest = 2.0**-24 / UNIT_ROUNDOFF[inputs["x"].dtype]
    ulps = inputs["x"].shape[1] ** 0.5 * rest
    exact = oracle(inputs)
    up = (d["x"].square() @ d["weight"].square().t()).sqrt() * ulps
    down = (d["dy"].square() @ d["down"].square()).sqrt() * ulps
    e_gate, e_value = up.chunk(2, -1)
    slope, a = _factors(exact["u"], d)
    y = exact["y"].abs() + ((e_gate * slope).square() + (e_value * a).square()).sqrt()
    slope, a = _factors(d["u"], d)
    more = torch.cat((down * slope, down * a), -1)
    out = {"u": exact["u"].abs() + up, "y": y, "du": exact["du"].abs() + more}
    if inputs["bias"] is not None:
        left = (more.square() + (exact["du"] * rest).square()).sum(0).sqrt()
        out["dbias"] = exact["dbias"].abs() + left
    return out


def _factors(u: torch.Tensor, d: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes of y's derivatives by the gate, at most, and by the value."""
    gate, value = (u if d["bias"] is None else u + d["bias"]).chunk(2, -1)
    return MOST_SLOPE * value.abs(), act(gate, d["activation"]).abs()


def plain_torch(inputs: dict) -> dict:
    """Results of stock torch in this dtype: one op after the other, each rounding."""
    i, out = inputs, {}
    out["u"] = i["x"] @ i["weight"].t()
    for name, u in (("y", out["u"]), ("du", i["u"])):
        both = (u if i["bias"] is None else u + i["bias"]).detach().requires_grad_()
        gate, value = both.chunk(2, -1)
        out[name] = act(gate, i["activation"]) * value
    (du,) = torch.autograd.grad(out["du"], both, i["dy"] @ i["down"])
    out |= {"y": out["y"].detach(), "du": du}
    return out if i["bias"] is None else out | {"dbias": du.sum(0)}
