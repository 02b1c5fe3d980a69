"""linear_gelu's cases, inputs and rounding model.

Forward and backward are two calls on inputs of their own, as a layer's node makes them: u of the
backward is given, so that its budget knows nothing of the forward's rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..ops.linear import reference
from ..ops.linear.run import Choice, backward, forward
from .budget import UNIT_ROUNDOFF
from .layouts import rows_apart

FLOATS = ("x", "weight", "bias", "dy", "down", "u")


@dataclass(frozen=True)
class Case:
    rows: int
    inputs: int  # of the forward's product, and outputs of the one whose gradient is given
    outputs: int
    bias: bool = True
    approximate: str = "none"
    values: str = "normal"  # or "wide", "tail", "cancelling", "zero"
    layout: str = "contiguous"  # or "rows apart", "shifted": x and dy, and the weights
    kernels: int = 1  # 2: a product of torch's and the backend's bias_gelu

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.inputs}x{self.outputs}"]
        words += [] if self.bias else ["no bias"]
        words += ["two kernels"] if self.kernels == 2 else []
        words += ["tanh"] if self.approximate == "tanh" else []
        words += [w for w in (self.values, self.layout) if w not in ("normal", "contiguous")]
        return "-".join(words).replace(" ", "-")


def quick_cases() -> list[Case]:
    """The cases of `bertfast verify`: ragged in each size, more than one tile, every feature."""
    return [
        Case(70, 96, 200),
        Case(1, 8, 8, approximate="tanh"),
        Case(130, 72, 136, bias=False),
        Case(33, 264, 40, values="tail"),
        Case(17, 40, 72, layout="rows apart"),
        Case(100, 72, 136, kernels=2),
    ]


def gpu_cases() -> list[Case]:
    """More tiles of 128 x 128 than a kernel that stays for many of them asks for."""
    return [Case(1030, 200, 1032)]


def cases() -> list[Case]:
    """Sizes around the tiles of the kernels, 32 to 256."""
    rows = [Case(rows, 64, 64) for rows in (0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257)]
    inputs = [Case(19, inputs, 48) for inputs in (8, 16, 24, 32, 40, 56, 72, 104, 136, 264, 520)]
    outputs = [Case(21, 48, outputs) for outputs in (8, 16, 24, 56, 72, 120, 136, 248, 264, 520)]
    features = [
        Case(37, 72, 88, bias=bias, approximate=approximate)
        for bias in (True, False)
        for approximate in ("none", "tanh")
    ]
    values = [
        Case(40, 72, 136, values=kind, approximate=approximate)
        for kind in ("wide", "tail", "cancelling", "zero")
        for approximate in ("none", "tanh")
    ]
    split = [
        Case(rows, 40, 72, kernels=2, approximate=a) for rows in (1, 133) for a in ("none", "tanh")
    ]
    layouts = [Case(37, 40, 72, layout=layout) for layout in ("rows apart", "shifted")]
    return [*rows, *inputs, *outputs, *features, *values, *layouts, *split, Case(200, 128, 392)]


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    size = {"wide": 4.0, "zero": 0.0}.get(case.values, 1.0)
    x, dy = normal(case.rows, case.inputs) * size, normal(case.rows, case.inputs)
    weight = normal(case.outputs, case.inputs) / case.inputs**0.5
    down = normal(case.inputs, case.outputs) / case.inputs**0.5
    bias, u = normal(case.outputs) * 0.1, normal(case.rows, case.outputs) * size
    if case.values == "tail":
        bias, u = bias - 4.0, u - 4.0
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
        "approximate": case.approximate,
        "kernels": case.kernels,
    }


def _as(dtype: torch.dtype, inputs: dict, device: str = "cpu") -> dict:
    moved = {name: inputs[name].to(device, dtype) for name in FLOATS if inputs[name] is not None}
    return inputs | moved


def run(inputs: dict, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> dict:
    """Both calls by a backend. dtype=torch.float64 with "torch" is the oracle."""
    i = _as(dtype or inputs["x"].dtype, inputs, device) if device != "cpu" or dtype else inputs
    tanh = i["approximate"] == "tanh"
    if backend == "torch":
        y = reference.forward(i["x"], i["weight"], i["bias"], tanh)
        out = {"y": y, "u": (i["x"] @ i["weight"].t())}
        compute = torch.float64 if dtype == torch.float64 else None
        out["dv"], summed = _derivative(i, i["dy"], compute)
        return out if i["bias"] is None else out | {"dbias": summed}
    y, u = up(inputs, backend, device)
    choice, wanted = _choice(inputs, backend), (True, i["bias"] is not None)
    made = backward(i["dy"], i["down"], i["u"], i["bias"], tanh, wanted, choice)
    found = zip(("y", "u", "dv", "dbias"), (y, u, *made), strict=True)
    return {name: value for name, value in found if value is not None}


def _choice(inputs: dict, backend: str) -> Choice:
    return Choice(backend) if inputs["kernels"] == 2 else Choice(backend, backend, backend)


def up(
    inputs: dict, backend: str, device: str = "cpu", save: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The forward alone: y and, if it is to be saved, u."""
    i = _as(inputs["x"].dtype, inputs, device) if device != "cpu" else inputs
    choice = _choice(inputs, backend)
    return forward(i["x"], i["weight"], i["bias"], i["approximate"] == "tanh", choice, save)


def _derivative(
    i: dict,
    dy: torch.Tensor,
    compute: torch.dtype | None = None,
    column_sum: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.sum(0),
    approximate: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dv and dbias by torch, rounded once."""
    dtype, compute = dy.dtype, compute or torch.float32
    v = i["u"].to(compute)
    if i["bias"] is not None:
        v = v + i["bias"].to(compute)
    v.requires_grad_()
    dh = dy.to(compute) @ i["down"].to(compute)
    if i["kernels"] == 2:
        dh = dh.to(dtype).to(compute)
    y = F.gelu(v, approximate=approximate or i["approximate"])
    (dv,) = torch.autograd.grad(y, v, dh)
    return dv.to(dtype), column_sum(dv).to(dtype)


def oracle(inputs: dict) -> dict:
    return run(inputs, "torch", dtype=torch.float64)


def rounding_model(
    inputs: dict,
    approximate: str | None = None,
    column_sum: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.sum(0),
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul,
) -> dict:
    """float32 arithmetic, rounded where the algorithm must: u as it is saved, and the outputs;
    between two kernels also dy down, whose rounding errors dbias adds up over the rows.

    approximate, column_sum and product are the places where tests plant a precision fault.
    """
    dtype, f = inputs["x"].dtype, _as(torch.float32, inputs)
    u = product(f["x"], f["weight"].t()).to(dtype)
    v = u.float() if f["bias"] is None else u.float() + f["bias"]
    y = F.gelu(v, approximate=approximate or inputs["approximate"])
    dv, dbias = _derivative(inputs, inputs["dy"], None, column_sum, approximate)
    out = {"y": y.to(dtype), "u": u, "dv": dv}
    return out if inputs["bias"] is None else out | {"dbias": dbias}


def scales(inputs: dict) -> dict:
    """Factors of the budget's u where they exceed |reference|.

    A product of which much cancels keeps 2^-24 of the sizes of its terms for each partial sum that
    was rounded. Rounding errors of a sum's steps are independent: sqrt(inputs) of them are left. In
    units of u that is sqrt(inputs) * (2^-24 / u) times the sizes' root mean square. GELU's slope
    is at most 1.13. dbias: rows' errors are independent, and each row's value is rounded into a
    float32 sum.
    """
    d = _as(torch.float64, inputs)
    rest = 2.0**-24 / UNIT_ROUNDOFF[inputs["x"].dtype]
    ulps = inputs["x"].shape[1] ** 0.5 * rest
    exact = oracle(inputs)
    up = (d["x"].square() @ d["weight"].square().t()).sqrt() * ulps
    down = (d["dy"].square() @ d["down"].square()).sqrt() * ulps * 1.13
    out = {"u": exact["u"].abs() + up, "y": exact["y"].abs() + 1.13 * up}
    out["dv"] = exact["dv"].abs() + down
    if inputs["bias"] is not None:
        left = (down.square() + (exact["dv"] * rest).square()).sum(0).sqrt()
        out["dbias"] = exact["dbias"].abs() + left
    return out


def plain_torch(inputs: dict) -> dict:
    """Results of stock torch in this dtype: one op after the other, each rounding."""
    i, tanh = inputs, inputs["approximate"]
    u = F.linear(i["x"], i["weight"])
    y = F.gelu(F.linear(i["x"], i["weight"], i["bias"]), approximate=tanh)
    v = i["u"] if i["bias"] is None else i["u"] + i["bias"]
    dv = torch.ops.aten.gelu_backward(i["dy"] @ i["down"], v, approximate=tanh)
    out = {"y": y, "u": u, "dv": dv}
    return out if i["bias"] is None else out | {"dbias": dv.sum(0)}
