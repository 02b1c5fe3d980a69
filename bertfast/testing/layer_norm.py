"""The cases of layer_norm and rms_norm, their inputs and rounding model."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..ops import dropout, layer_norm, rms_norm
from .budget import UNIT_ROUNDOFF
from .layouts import lay_out

NAMES = ("x", "weight", "bias", "residual", "x_bias")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    residual: bool = True
    x_bias: bool = True
    p: float = 0.0
    eps: float = 1e-12
    values: str = "normal"  # or "offset", "large", "tiny", "near constant"
    layout: str = "contiguous"  # or "rows apart", "transposed", "strided"
    row_index: bool = False
    x_is_16_bit: bool = False  # below a float32 stream, as under autocast
    bias: bool = True
    rms: bool = False  # rms_norm, without a bias
    return_sum: bool = False  # which then has a gradient, too

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape))]
        words += [name for name in ("residual", "x_bias", "row_index") if getattr(self, name)]
        words += [f"p={self.p}"] if self.p else []
        words += [f"eps={self.eps}"] if self.eps != 1e-12 else []
        words += [w for w in (self.values, self.layout) if w not in ("normal", "contiguous")]
        words += ["16-bit x"] if self.x_is_16_bit else []
        words += ["no bias"] if not (self.bias or self.rms) else []
        words += [name for name in ("rms", "return_sum") if getattr(self, name)]
        return "-".join(words).replace(" ", "-")


def quick_cases() -> list[Case]:
    """The cases of `bertfast verify`: BERT's widths, every feature, the hostile values."""
    return [
        Case((3, 7, 768)),
        Case((2, 5, 768), p=0.1),
        Case((2, 9, 384), p=0.1, row_index=True),
        Case((9, 1024), residual=False, x_bias=False),
        Case((5, 130), p=0.5, values="offset"),
        Case((7, 33), layout="rows apart"),
        Case((5, 768), p=0.1, return_sum=True),
        Case((9, 384), bias=False, return_sum=True),
        Case((4, 130), rms=True, eps=1e-6, p=0.1),
    ]


def cases() -> list[Case]:
    base = Case((2, 3, 768))
    features = [
        replace(base, residual=r, x_bias=b, p=p)
        for r in (False, True)
        for b in (False, True)
        for p in (0.0, 0.1)
    ]
    widths = [
        Case((3, width), p=0.1 if width % 2 else 0.0)
        for width in (1, 2, 7, 8, 31, 33, 128, 384, 511, 512, 513, 1023, 1024, 1025)
    ] + [Case((2, width), p=0.1) for width in (2048, 3072, 4096, 5000, 8191, 8192)]
    rows = [
        Case((768,)),
        Case((5, 1)),
        Case((1, 1, 768), p=0.1),
        Case((0, 768), p=0.1),
        Case((2, 0, 64)),
        Case((77, 40), p=0.1),
        Case((19, 384), p=0.1, row_index=True),
        Case((2, 3, 5, 64)),
    ]
    values = [
        Case((5, 768), values=kind, eps=eps)
        for kind, eps in (
            ("offset", 1e-12),
            ("large", 1e-12),
            ("tiny", 1e-12),
            ("tiny", 1e-5),
            ("near constant", 1e-5),
        )
    ]
    layouts = [
        replace(base, layout=layout, p=p)
        for layout in ("rows apart", "transposed", "strided")
        for p in (0.0, 0.1)
    ]
    probabilities = [replace(base, p=p) for p in (0.5, 0.999, 1.0)]
    return features + widths + rows + values + layouts + probabilities


def further_cases() -> list[Case]:
    """Without a bias, of RMSNorm, and with the sum: each at a width with kernels of its own, at
    others, and where nothing is added."""
    forms: list[dict[str, Any]] = [
        dict(bias=False),
        dict(return_sum=True),
        dict(bias=False, return_sum=True),
        dict(rms=True, eps=1e-6),
        dict(rms=True, eps=1e-6, return_sum=True),
    ]
    shapes = [(3, 2, 768), (5, 1023), (19, 384), (3, 130), (2, 4096)]
    added = [
        Case(shape, p=0.1 * (number % 2), row_index=shape[0] == 19, **form)
        for number, shape in enumerate(shapes)
        for form in forms[number:] + forms[:number][-1:]
    ]
    alone = [Case((5, 512), residual=False, x_bias=False, **form) for form in forms]
    others = [
        Case((2, 3, 768), layout="rows apart", rms=True, return_sum=True, eps=1e-6),
        Case((6, 1), rms=True, return_sum=True, eps=1e-6),
        Case((0, 64), rms=True, return_sum=True),
    ]
    return added + alone + others


def mixed_cases() -> list[Case]:
    """16-bit x in a float32 stream; run with dtype float32."""
    further = [
        Case((2, 3, 768), x_is_16_bit=True, p=0.1, return_sum=True),
        Case((2, 3, 130), x_is_16_bit=True, rms=True, eps=1e-6, return_sum=True),
    ]
    return further + [
        Case((2, 3, width), x_is_16_bit=True, p=p, x_bias=x_bias)
        for width in (384, 768, 1023)
        for p in (0.0, 0.1)
        for x_bias in (False, True)
    ]


def _values(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    if kind == "offset":
        return normal + 100.0
    if kind == "large":
        return normal * 8000.0  # a square overflows float16
    if kind == "tiny":
        return normal * 1e-4
    if kind == "near constant":
        return 3.0 + normal * 1e-3
    return normal


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    width, rows = case.shape[-1], math.prod(case.shape[:-1])
    x = _values(case.shape, case.values, generator)
    x_dtype = torch.bfloat16 if case.x_is_16_bit else dtype
    inputs = {
        "x": lay_out(x.to(x_dtype), case.layout),
        "weight": (torch.rand(width, generator=generator) + 0.5).to(dtype),
        "bias": torch.randn(width, generator=generator).to(dtype),
        "residual": None,
        "x_bias": None,
        "dy": lay_out(torch.randn(case.shape, generator=generator).to(dtype), case.layout),
        "eps": case.eps,
        "p": case.p,
        "seed": torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator),
        "site": 5,
        "row_index": None,
        "rms": case.rms,
        "dsum": None,
    }
    if case.rms or not case.bias:
        inputs["bias"] = None
    if case.return_sum:
        dsum = torch.randn(case.shape, generator=generator)
        inputs["dsum"] = lay_out(dsum.to(dtype), case.layout)
    if case.residual:
        residual = _values(case.shape, case.values, generator)
        inputs["residual"] = lay_out(residual.to(dtype), case.layout)
    if case.x_bias:
        inputs["x_bias"] = (torch.randn(width, generator=generator) * 0.1).to(dtype)
    if case.row_index:
        # Rows of a padded batch, in order with gaps, some beyond 32 bits.
        gaps = torch.randint(1, 2**29, (rows,), generator=generator)
        inputs["row_index"] = gaps.cumsum(0)
    return inputs


def run(inputs: dict, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> dict:
    """Output and gradients by a backend. dtype=torch.float64 with "torch" is the oracle."""
    leaves = {
        name: inputs[name].to(device, dtype).detach().requires_grad_()
        for name in NAMES
        if inputs[name] is not None
    }
    mixed = dtype is None and inputs["x"].dtype != inputs["weight"].dtype
    row_index = inputs["row_index"]
    with torch.autocast(device, dtype=inputs["x"].dtype, enabled=mixed):
        norm = rms_norm if inputs["rms"] else functools.partial(layer_norm, bias=None)
        made = norm(
            **leaves,
            eps=inputs["eps"],
            dropout_p=inputs["p"],
            seed=inputs["seed"].to(device),
            site=inputs["site"],
            row_index=None if row_index is None else row_index.to(device),
            return_sum=inputs["dsum"] is not None,
            backend=backend,
        )
    outs, names = (made, ("y", "sum")) if isinstance(made, tuple) else ((made,), ("y",))
    given = [inputs[name].to(device, dtype) for name in ("dy", "dsum")[: len(outs)]]
    grads = torch.autograd.grad(outs, list(leaves.values()), given)
    found = {name: out.detach() for name, out in zip(names, outs, strict=True)}
    return found | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def oracle(inputs: dict) -> dict:
    return run(inputs, "torch", dtype=torch.float64)


def _keep(inputs: dict) -> torch.Tensor | None:
    """The dropout factor of each value: 0 or the inverse of the keep probability."""
    threshold = dropout.threshold(inputs["p"])
    if not threshold:
        return None
    shape = inputs["x"].shape
    rows = inputs["row_index"]
    if rows is None:
        rows = torch.arange(math.prod(shape[:-1]))
    keep = dropout.row_keep_mask(inputs["seed"], inputs["site"], rows, shape[-1], threshold)
    return keep.view(shape).float() * dropout.keep_scale(threshold)


def _as(dtype: torch.dtype, inputs: dict) -> dict:
    """The inputs with their floating-point tensors in another dtype."""
    floats = {
        k: v.to(dtype) for k, v in inputs.items() if k in (*NAMES, "dy", "dsum") and v is not None
    }
    return inputs | floats


def _z(f: dict) -> torch.Tensor:
    """dropout(x + x_bias) + residual, op by op."""
    z, keep = f["x"], _keep(f)
    if f["x_bias"] is not None:
        z = z + f["x_bias"]
    if keep is not None:
        z = torch.where(keep > 0, z * keep.to(z.dtype), 0.0)
    return z if f["residual"] is None else z + f["residual"]


def rounding_model(
    inputs: dict,
    statistics: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    column_sum: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.sum(0),
) -> dict:
    """float32 arithmetic, rounded where the algorithm must: z as it is saved, and the outputs.

    statistics and column_sum are the places where tests plant a precision fault.
    """
    dtype, x_dtype = inputs["weight"].dtype, inputs["x"].dtype
    f = _as(torch.float32, inputs)
    keep = _keep(inputs)
    z = _z(f)
    rms = inputs["rms"]
    mean = 0.0 if rms else statistics(z.mean(-1, keepdim=True))
    variance = (z - mean).square().mean(-1, keepdim=True)
    rstd = statistics(torch.rsqrt(variance + inputs["eps"]))
    y = (z - mean) * rstd * f["weight"]
    if f["bias"] is not None:
        y = y + f["bias"]

    if z.shape[-1] == 1 and not rms:
        rstd = torch.zeros_like(rstd)  # as the kernels save it: a row of one value is its own mean
    h = (z.to(dtype).float() - mean) * rstd
    g = f["dy"] * f["weight"]
    mean_g = 0.0 if rms else g.mean(-1, keepdim=True)
    dz = rstd * (g - mean_g - h * (g * h).mean(-1, keepdim=True))
    if f["dsum"] is not None:
        dz = dz + f["dsum"]
    dx = dz if keep is None else dz * keep
    out = {"y": y.to(dtype), "dx": dx.to(x_dtype)}
    rows = (-1, z.shape[-1])
    out["dweight"] = column_sum((f["dy"] * h).reshape(rows)).to(dtype)
    if f["bias"] is not None:
        out["dbias"] = column_sum(f["dy"].reshape(rows)).to(dtype)
    if f["dsum"] is not None:
        out["sum"] = z.to(dtype)
    if f["residual"] is not None:
        out["dresidual"] = dz.to(dtype)
    if f["x_bias"] is not None:
        out["dx_bias"] = column_sum(dx.reshape(rows)).to(dtype)
    return out


def scales(inputs: dict) -> dict:
    """Factors of the budget's u where they exceed |reference|.

    dz = rstd * (g - <g> - h * <g * h>) + dsum may cancel: where one value dominates a row, h^2 / N
    is near 1, and dsum is independent. Each term is rounded in float32 before, so 2^-24 of the
    terms' sizes remains in the result; in units of u that is (2^-24 / u) times the sum of their
    sizes: nothing for 16-bit dtypes.
    """
    terms, dz = _dz_terms(_as(torch.float64, inputs))
    keep = _keep(inputs)
    out = {}
    for name, factor in (("dresidual", 1.0), ("dx", 1.0 if keep is None else keep.double())):
        u = UNIT_ROUNDOFF[inputs["x"].dtype if name == "dx" else inputs["weight"].dtype]
        out[name] = (dz.abs() + terms * (2.0**-24 / u)) * factor
    if inputs["x_bias"] is not None:
        # A sum over rows; what remains of each row's terms is independent of the others'.
        width = dz.shape[-1]
        dx = dz if keep is None else dz * keep
        rest = (out["dx"] - dx.abs()).reshape(-1, width).square().sum(0).sqrt()
        out["dx_bias"] = dx.reshape(-1, width).sum(0).abs() + rest
    return out


def _dz_terms(f: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed sizes of dz's terms, and dz itself."""
    z = _z(f)
    centred = z if f["rms"] else z - z.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + f["eps"])
    h = centred * rstd
    g = f["dy"] * f["weight"]
    mean_g = torch.zeros(()) if f["rms"] else g.mean(-1, keepdim=True)
    parts = [rstd * part for part in (g, -mean_g, -h * (g * h).mean(-1, keepdim=True))]
    if f["dsum"] is not None:
        parts.append(f["dsum"])
    stacked = torch.stack(torch.broadcast_tensors(*parts))
    return stacked.abs().sum(0), stacked.sum(0)


def plain_torch(inputs: dict) -> dict:
    """Results of stock torch in this dtype: one op after the other, each rounding."""
    leaves = {
        name: inputs[name].detach().requires_grad_() for name in NAMES if inputs[name] is not None
    }
    z = _z(inputs | leaves)
    shape, weight, eps = z.shape[-1:], leaves["weight"], inputs["eps"]
    if inputs["rms"]:
        y = F.rms_norm(z, shape, weight, eps)
    else:
        y = F.layer_norm(z, shape, weight, leaves.get("bias"), eps)
    outs = {"y": y} if inputs["dsum"] is None else {"y": y, "sum": z}
    given = [inputs["dy"], inputs["dsum"]][: len(outs)]
    grads = torch.autograd.grad(list(outs.values()), list(leaves.values()), given)
    found = {name: out.detach() for name, out in outs.items()}
    return found | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
