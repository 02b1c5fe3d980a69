"""bias_gelu's cases, inputs and rounding model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..ops import bias_gelu
from .layouts import lay_out

NAMES = ("x", "bias")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    bias: bool = True
    approximate: str = "none"
    values: str = "normal"  # or "wide", "large", "tiny", "tail", "zero"
    layout: str = "contiguous"  # or "rows apart", "transposed", "strided"
    x_is_16_bit: bool = False  # below a float32 bias, as under autocast

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)) or "scalar"]
        words += [] if self.bias else ["no bias"]
        words += ["tanh"] if self.approximate == "tanh" else []
        words += [w for w in (self.values, self.layout) if w not in ("normal", "contiguous")]
        words += ["16-bit x"] if self.x_is_16_bit else []
        return "-".join(words).replace(" ", "-")


def quick_cases() -> list[Case]:
    """The cases of `bertfast verify`: an encoder's width, every feature, the hostile values."""
    return [
        Case((3, 7, 3072)),
        Case((5, 1536), approximate="tanh"),
        Case((3, 3, 513), bias=False, values="wide"),
        Case((3, 257), bias=False, approximate="tanh", values="wide"),
        Case((65, 40), values="tail"),
        Case((7, 33), layout="rows apart"),
    ]


def cases() -> list[Case]:
    plain = [
        Case((2, 3, 768), bias=bias, approximate=approximate)
        for bias in (True, False)
        for approximate in ("none", "tanh")
    ]
    widths = [
        Case((3, width), approximate="tanh" if width % 5 == 0 else "none")
        for width in (1, 2, 7, 8, 31, 33, 255, 257, 512, 1023, 1024, 1025, 1536, 3072)
    ]
    rows = [
        Case((768,)),
        Case((300, 5)),
        Case((67, 256)),
        Case((1, 1, 2100)),
        Case((0, 64)),
        Case((2, 0)),
        Case((2, 3, 5, 64)),
        Case((), bias=False),
        Case((5001,), bias=False),
        Case((0,), bias=False),
    ]
    values = [
        Case((9, 513), bias=bias, approximate=approximate, values=kind)
        for kind in ("wide", "large", "tiny", "tail", "zero")
        for bias, approximate in ((True, "none"), (False, "tanh"), (False, "none"))
    ]
    layouts = [
        Case((2, 3, 384), bias=bias, layout=layout)
        for layout in ("rows apart", "transposed", "strided")
        for bias in (True, False)
    ]
    return plain + widths + rows + values + layouts


def mixed_cases() -> list[Case]:
    """16-bit x with a float32 bias; run with dtype float32."""
    return [
        Case((3, width), approximate=approximate, x_is_16_bit=True)
        for width in (33, 1536)
        for approximate in ("none", "tanh")
    ]


def _values(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    scale = {"wide": 4.0, "large": 8000.0, "tiny": 1e-4, "zero": 0.0}.get(kind, 1.0)
    return -3.0 - normal.abs() if kind == "tail" else normal * scale


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    x_dtype = torch.bfloat16 if case.x_is_16_bit else dtype
    bias = None
    if case.bias:
        small = 0.0 if case.values == "zero" else 1e-5 if case.values == "tiny" else 0.1
        bias = (torch.randn(case.shape[-1], generator=generator) * small).to(dtype)
    return {
        "x": lay_out(_values(case.shape, case.values, generator).to(x_dtype), case.layout),
        "bias": bias,
        "dy": lay_out(torch.randn(case.shape, generator=generator).to(dtype), case.layout),
        "approximate": case.approximate,
    }


def run(inputs: dict, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> dict:
    """Output and gradients by a backend. dtype=torch.float64 with "torch" is the oracle."""
    leaves = {
        name: inputs[name].to(device, dtype).detach().requires_grad_()
        for name in NAMES
        if inputs[name] is not None
    }
    mixed = dtype is None and inputs["x"].dtype != inputs["dy"].dtype
    with torch.autocast(device, dtype=inputs["x"].dtype, enabled=mixed):
        y = bias_gelu(**leaves, approximate=inputs["approximate"], backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(device, dtype))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def oracle(inputs: dict) -> dict:
    return run(inputs, "torch", dtype=torch.float64)


def rounding_model(
    inputs: dict,
    approximate: str | None = None,
    column_sum: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.sum(0),
) -> dict:
    """The reference in float32, rounded at the outputs and nowhere else.

    approximate and column_sum are the places where tests plant a precision fault.
    """
    v = inputs["x"].float()
    if inputs["bias"] is not None:
        v = v + inputs["bias"].float()
    v.requires_grad_()
    y = F.gelu(v, approximate=approximate or inputs["approximate"])
    (dx,) = torch.autograd.grad(y, v, inputs["dy"].float())
    dtype = inputs["dy"].dtype
    out = {"y": y.detach().to(dtype), "dx": dx.to(inputs["x"].dtype)}
    if inputs["bias"] is not None:
        width = v.shape[-1]
        out["dbias"] = column_sum(dx.reshape(v.numel() // max(1, width), width)).to(dtype)
    return out


def scales(inputs: dict) -> dict:
    """Factors of the budget's u where they exceed |reference|: none."""
    return {}


def plain_torch(inputs: dict) -> dict:
    """Results of stock torch in this dtype: one op after the other, each rounding."""
    leaves = {
        name: inputs[name].detach().requires_grad_() for name in NAMES if inputs[name] is not None
    }
    v = leaves["x"] + leaves["bias"] if "bias" in leaves else leaves["x"]
    y = F.gelu(v, approximate=inputs["approximate"])
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
