"""attention's cases, inputs and rounding model.

The rounding model works on the padded form of every case, sequence by sequence the same numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import packing
from ..ops import attention, attention_qkv, dropout
from . import positions
from .budget import UNIT_ROUNDOFF

NAMES = ("q", "k", "v")
GRADIENTS = ("dq", "dk", "dv", "dbias")
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Case:
    """Lengths of a batch's sequences; padded to the longest, or packed."""

    lengths: tuple[int, ...]
    heads: int = 1
    head_dim: int = 32
    mask: str = "none"  # padded: "right", "left", "holes", "all" (the first row), or "none"
    packed: bool = False
    plan: bool = False
    p: float = 0.0
    scale: float | None = None
    # or "large" (products beyond fp16), "spoilt" (NaN, Inf at masked keys), "near" (scores that
    # differ by a few, so that each counts, around `top`), "far" (up to about `top`, far apart)
    values: str = "normal"
    top: float = 0.0  # in size
    layout: str = "one buffer"  # or "apart", "heads first"
    rotary: bool = False
    window: tuple[int, int] | None = None
    reach: int | None = None  # of a bias by distance

    @property
    def features(self) -> tuple[str, ...]:
        """Arguments that a backend may not have, in the order of its limits."""
        given = {
            "rotary": self.rotary,
            "window": self.window is not None,
            "distance_bias": self.reach is not None,
        }
        return tuple(name for name, used in given.items() if used)

    def __str__(self) -> str:
        words = ["+".join(map(str, self.lengths)), f"H{self.heads}", f"D{self.head_dim}"]
        words += [word for word in ("packed", "plan") if getattr(self, word)]
        words += [self.mask] if self.mask != "none" else []
        words += [f"p={self.p}"] if self.p else []
        words += [f"scale={self.scale}"] if self.scale is not None else []
        words += [f"scores={self.top:g}"] if self.top else []
        words += ["rotary"] if self.rotary else []
        words += ["window={}+{}".format(*self.window)] if self.window else []
        words += [f"bias={self.reach}"] if self.reach is not None else []
        words += [w for w in (self.values, self.layout) if w not in ("normal", "one buffer")]
        return "-".join(words).replace(" ", "-")


def quick_cases() -> list[Case]:
    """The cases of `bertfast verify`: each layout and feature once, the hostile values."""
    return [
        Case((70,), head_dim=64),
        Case((45, 60), mask="right", p=0.1),
        Case((40, 70), mask="left", p=0.2),
        Case((50, 64), mask="holes", values="spoilt"),
        Case((17, 0, 70, 3), packed=True, p=0.1),
        Case((17, 0, 40, 70, 3), packed=True, plan=True, p=0.1),
        Case((17, 30, 130, 9, 40), packed=True, plan=True, p=0.1),
        Case((33,), head_dim=128, values="large"),
        Case((140,), head_dim=64),
        Case((257,), values="near", top=3e3),
        Case((150,), values="far", top=3e7),
        Case((40, 70), mask="holes", scale=0.0),
        Case((150,), rotary=True, window=(40, 9)),
        Case((17, 30, 9, 80), packed=True, plan=True, reach=12, p=0.1),
    ]


def cases() -> list[Case]:
    lengths = [Case((n,)) for n in (1, 2, 17, 64, 65, 127, 128, 129)]
    long = [Case((n,)) for n in (512, 513)]
    head_dims = [Case((66,), head_dim=d) for d in (8, 40, 64, 96, 128)]
    head_dims += [Case((130,), head_dim=d) for d in (16, 128)]
    masks = [
        Case((30, 70), mask=mask, p=p, head_dim=16)
        for mask in ("right", "left", "holes", "all")
        for p in (0.0, 0.2)
    ]
    masks += [Case((77, 150), mask=mask, p=0.2) for mask in ("right", "left", "holes")]
    packed = [
        Case(lengths, packed=True, plan=plan, p=p, head_dim=16)
        for lengths in (
            *((5, 0, 30, 20, 9, 0, 40), (0, 70, 3, 64, 129, 0), (20,) * 5),
            *((17, 40, 130, 9, 50, 3), (40, 20, 60)),
        )
        for plan in (False, True)
        for p in (0.0, 0.2)
    ]
    dropouts = [Case((70,), p=p) for p in (0.5, 0.999, 1.0)]
    dropouts += [Case((65,), heads=2, p=0.1), Case((140,), head_dim=64, p=0.1)]
    values = [
        Case((70,), values="large"),
        Case((140,), values="large", head_dim=64),
        Case((70, 40), values="spoilt", mask="right"),
        Case((70, 40), values="spoilt", mask="left", p=0.2),
        Case((150, 140), values="spoilt", mask="holes"),
        Case((40,), scale=0.5),
        Case((40,), scale=-0.1),
    ]
    # The rounding of a large score, times log2 e, must not get into what blocks are rescaled by.
    values += [
        Case((257,), values="near", top=3e3),
        Case((140,), values="near", top=-3e3, head_dim=128),
        Case((70, 140), values="near", top=3e3, mask="holes", p=0.1),
        Case((17, 40, 130, 9), values="near", top=3e3, packed=True, plan=True),
        Case((257,), values="near", top=1e5),
        Case((140,), values="far", top=1e5, head_dim=64),
        Case((164,), values="far", top=3e7),
    ]
    # What doesn't count has the score -inf, which times a scale of zero would be NaN.
    values += [
        Case((70,), scale=0.0),
        Case((40, 150), mask="holes", scale=0.0, p=0.1),
        Case((17, 40, 9), packed=True, plan=True, scale=0.0),
        Case((17, 40, 130), packed=True, scale=-0.7),
        Case((140,), scale=-30.0),
    ]
    layouts = [
        Case((40, 66), heads=2, layout=layout, packed=packed)
        for layout in ("one buffer", "apart", "heads first")
        for packed in (False, True)
    ]
    return lengths + long + head_dims + masks + packed + dropouts + values + layouts


def cases_by_position() -> list[Case]:
    """Rotary positions, windows and biases by distance, alone and together."""
    return [
        Case((70, 40), heads=2, head_dim=16, rotary=True, layout="apart"),
        Case((40, 140), mask="left", rotary=True, p=0.1),
        Case((150,), head_dim=64, window=(40, 9)),
        Case((70, 100), mask="holes", window=(1, 0), p=0.2),
        Case((70, 150), mask="left", window=(64, 64), p=0.2),
        Case((300,), window=(64, 64), rotary=True),
        Case((70,), heads=2, reach=20, p=0.1),
        Case((130, 20), heads=2, mask="right", reach=129),
        Case((40, 70), mask="all", reach=3, window=(20, 30)),
        Case((17, 0, 90, 9), heads=2, packed=True, reach=30, rotary=True),
        Case((17, 0, 40, 200, 3), packed=True, plan=True, rotary=True, window=(30, 30), p=0.1),
        Case((17, 30, 9, 80), packed=True, plan=True, reach=12, p=0.1),
        Case((20, 9, 14, 3), packed=True, plan=True, rotary=True, reach=40, window=(5, 8)),
        Case((70,), scale=-0.1, reach=0, head_dim=96, rotary=True),
        Case((80, 33), mask="right", window=(2**30, 0), rotary=True, p=0.1),  # a causal mask
    ]


def gpu_cases() -> list[Case]:
    return cases_by_position()


def _key_mask(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    if case.mask == "none":
        return None
    length = max(case.lengths)
    position = torch.arange(length)
    own = torch.tensor(case.lengths)[:, None]
    if case.mask == "left":
        return position >= length - own
    mask = position < own
    if case.mask == "holes":
        mask &= torch.rand(mask.shape, generator=generator) < 0.6
    if case.mask == "all":
        mask[0] = False
    return mask


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    tail = (case.heads, case.head_dim)
    lead: tuple[int, ...] = (len(case.lengths), max(case.lengths))
    if case.packed:
        lead = (sum(case.lengths),)
    size = 40.0 if case.values == "large" else 1.0  # a score of 1600 * sqrt(D) overflows float16
    values = torch.randn((*lead, 3, *tail), generator=generator)
    if case.values == "far":
        size = math.sqrt(case.top / 4)  # the largest of some ten thousand products of such values
    values[..., :2, :, :] *= size
    if case.values == "near":
        # One column's product, the same for all: two powers of two, the second with the sign.
        power = round(math.log2(abs(case.top) * math.sqrt(case.head_dim)))
        values[..., 0, :, 0] = 2.0 ** (power // 2)
        values[..., 1, :, 0] = math.copysign(2.0 ** (power - power // 2), case.top)
    buffer = values.to(dtype)
    key_mask = None if case.packed else _key_mask(case, generator)
    if key_mask is not None and case.values == "spoilt":
        spoilt = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(dtype)
        count = int((~key_mask).sum())
        buffer[..., 1:, :, :][~key_mask] = spoilt[torch.arange(count) % 3].view(-1, 1, 1, 1)
    q, k, v = buffer.unbind(-3)
    if case.layout == "apart":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    elif case.layout == "heads first":
        q, k, v = (t.transpose(-2, -3).contiguous().transpose(-2, -3) for t in (q, k, v))
    bias = None
    if case.reach is not None:
        bias = torch.randn((case.heads, 2 * case.reach + 1), generator=generator).to(dtype)
    cu_seqlens = None
    if case.packed:
        cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
    return {
        "q": q,
        "k": k,
        "v": v,
        "dout": torch.randn((*lead, *tail), generator=generator).to(dtype),
        "key_mask": key_mask,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max(case.lengths) if case.packed else None,
        "plan": case.plan,
        "p": case.p,
        "seed": torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator),
        "site": 3,
        "scale": case.scale,
        "rotary": positions.tables(max(case.lengths), case.head_dim) if case.rotary else None,
        "window": case.window,
        "distance_bias": bias,
    }


def options(inputs: dict, device: str = "cpu") -> dict:
    """The keyword arguments of the call."""
    moved = {
        name: None if inputs[name] is None else inputs[name].to(device)
        for name in ("key_mask", "cu_seqlens")
    }
    made = None
    if inputs["plan"]:
        total = inputs["q"].shape[0]
        made = packing.plan(inputs["cu_seqlens"].to(device), inputs["max_seqlen"], total)
    return moved | {
        "max_seqlen": inputs["max_seqlen"],
        "plan": made,
        "dropout_p": inputs["p"],
        "seed": inputs["seed"].to(device),
        "site": inputs["site"],
        "scale": inputs["scale"],
        "rotary": inputs["rotary"] and tuple(table.to(device) for table in inputs["rotary"]),
        "window": inputs["window"],
    }


def _bias(inputs: dict, device: str, dtype: torch.dtype | None) -> list[Tensor]:
    """The bias by distance, a leaf, if there is one."""
    bias = inputs["distance_bias"]
    return [] if bias is None else [bias.to(device, dtype).detach().requires_grad_()]


def run(inputs: dict, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> dict:
    """Output and gradients by a backend. dtype=torch.float64 with "torch" is the oracle."""
    leaves = [inputs[name].to(device, dtype).detach().requires_grad_() for name in NAMES]
    bias = _bias(inputs, device, dtype)
    more = options(inputs, device) | {"distance_bias": bias[0] if bias else None}
    out = attention(*leaves, **more, backend=backend)
    leaves += bias
    grads = torch.autograd.grad(out, leaves, inputs["dout"].to(device, dtype))
    return {"out": out.detach()} | dict(zip(GRADIENTS, grads, strict=False))


def run_qkv(
    inputs: dict, backend: str, device: str = "cpu", dtype: torch.dtype | None = None
) -> dict:
    """The same by attention_qkv, its gradient taken apart."""
    buffer = torch.stack([inputs[name].to(device, dtype) for name in NAMES], -3).requires_grad_()
    bias = _bias(inputs, device, dtype)
    more = options(inputs, device) | {"distance_bias": bias[0] if bias else None}
    out = attention_qkv(buffer, **more, backend=backend)
    leaves = [buffer, *bias]
    grad, *rest = torch.autograd.grad(out, leaves, inputs["dout"].to(device, dtype))
    return {"out": out.detach()} | dict(zip(GRADIENTS, (*grad.unbind(-3), *rest), strict=False))


def oracle(inputs: dict) -> dict:
    return run(inputs, "torch", dtype=torch.float64)


def _padded(
    inputs: dict, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, dout as (B, H, S, D), masked keys zeroed; the mask of scores; the dropout's factor.

    q and k are not rotated yet."""
    tensors = [inputs[name].to(dtype) for name in (*NAMES, "dout")]
    cu, mask = inputs["cu_seqlens"], inputs["key_mask"]
    if cu is not None:
        length = inputs["max_seqlen"]
        bounds = list(zip(cu.tolist(), cu.tolist()[1:], strict=False))
        tensors = [
            torch.stack([_pad(tensor[start:end], length) for start, end in bounds])
            for tensor in tensors
        ]
        mask = torch.arange(length) < (cu[1:] - cu[:-1])[:, None]
    if mask is None:
        mask = torch.ones(tensors[0].shape[:2], dtype=torch.bool)
    q, k, v, dout = (tensor.transpose(1, 2) for tensor in tensors)
    k, v = (tensor.masked_fill(~mask[:, None, :, None], 0.0) for tensor in (k, v))
    factor = None
    if threshold := dropout.threshold(inputs["p"]):
        shape = (*q.shape[:3], k.shape[2])
        start = mask.int().argmax(1)
        keep = dropout.attention_keep_mask(inputs["seed"], inputs["site"], shape, threshold, start)
        factor = keep.to(dtype) * dropout.keep_scale(threshold)
    inside = positions.in_window(q.shape[2], inputs["window"])
    return q, k, v, dout, mask[:, None, None, :] & inside, factor


def _pad(sequence: torch.Tensor, length: int) -> torch.Tensor:
    rest = sequence.new_zeros((length - sequence.shape[0], *sequence.shape[1:]))
    return torch.cat((sequence, rest))


def _packed_again(inputs: dict, tensor: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) in the layout of the inputs."""
    tensor = tensor.transpose(1, 2)
    if inputs["cu_seqlens"] is None:
        return tensor
    lengths = inputs["cu_seqlens"].diff().tolist()
    return torch.cat([row[:length] for row, length in zip(tensor, lengths, strict=True)])


def _scale(inputs: dict) -> float:
    scale = inputs["scale"]
    return 1 / math.sqrt(inputs["q"].shape[-1]) if scale is None else scale


def _scores(inputs: dict, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """(B, H, S, S) of rotated q and k."""
    scores = q @ k.transpose(-1, -2) * _scale(inputs)
    scores = scores + positions.bias_of(inputs["distance_bias"], q.shape[2], q.dtype)
    return scores.masked_fill(~mask, -torch.inf)


def rounding_model(
    inputs: dict,
    statistics: Callable[[Tensor], Tensor] = lambda t: t,
    operand: Callable[[Tensor], Tensor] | None = None,
) -> dict:
    """float32 arithmetic, rounded where the algorithm must: rotated q and k, p, ds, lse and out,
    and the gradients.

    statistics (of the scores) and operand are the places where tests plant a precision fault.
    """
    dtype, scale = inputs["q"].dtype, _scale(inputs)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).float()

    operand = operand or rounded
    q, k, v, dout, mask, factor = _padded(inputs, torch.float32)
    rotary, bias = inputs["rotary"], inputs["distance_bias"]
    if rotary:  # which rounds q and k once more
        q, k = (rounded(positions.rotated(x, rotary)) for x in (q, k))
    scores = _scores(inputs, q, k, mask)
    highest = statistics(scores.amax(-1, keepdim=True))
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    weights = torch.exp(scores - highest)
    total = statistics(weights.sum(-1, keepdim=True))
    p = weights / torch.where(total == 0, 1.0, total)
    dropped = p if factor is None else p * factor
    out = operand(dropped) @ v
    # The backward has p from lse, which is saved as one float32 number a row.
    lse = highest * LOG2E + torch.where(total == 0, 1.0, total).log2()
    p = torch.exp2(scores * LOG2E - lse)
    dropped = p if factor is None else p * factor
    dv = operand(dropped).transpose(-1, -2) @ dout
    dp = dout @ v.transpose(-1, -2)
    dp = dp if factor is None else dp * factor
    delta = (dout * rounded(out)).sum(-1, keepdim=True)
    exact = p * (dp - delta)
    ds = operand(exact)
    found = {"out": out, "dq": ds @ k * scale, "dk": ds.transpose(-1, -2) @ q * scale, "dv": dv}
    for name in ("dq", "dk"):
        found[name] = positions.rotated(found[name], rotary, back=True)
    found = {name: _packed_again(inputs, tensor) for name, tensor in found.items()}
    found = {name: tensor.to(dtype) for name, tensor in found.items()}
    if bias is not None:  # which may have a dtype of its own
        found["dbias"] = positions.by_distance(exact, bias).to(bias.dtype)
    return found


def scales(inputs: dict) -> dict:
    """Factors of the budget's u where they exceed |reference|.

    ds = p * (dp - delta) cancels, and dq and dk are sums of it that cancel again: each term is
    rounded to the dtype once, so u times the sum of the terms' sizes remains. As dp and delta are
    computed apart, the sizes are |p| * (|dp| + |delta|): for dq times |k|, for dk times |q|.
    """
    scale = abs(_scale(inputs))
    q, k, v, dout, mask, factor = _padded(inputs, torch.float64)
    rotary, bias = inputs["rotary"], inputs["distance_bias"]
    q, k = (positions.rotated(x, rotary) for x in (q, k))
    scores = _scores(inputs, q, k, mask)
    p = torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    dp = dout @ v.transpose(-1, -2)
    dp = dp if factor is None else dp * factor
    delta = (p * dp).sum(-1, keepdim=True)
    sizes = p * (dp.abs() + delta.abs())
    found = {"dq": sizes @ k.abs() * scale, "dk": sizes.transpose(-1, -2) @ q.abs() * scale}
    # exp turns an absolute error of a score into a relative one of p. A score's error is 2^-24 of
    # the sum of its products' sizes, as that is what the partial sums can be. In units of u: up to
    # 32 in float32, where u is 2^-24 too, the budget's own factor covers it, since a sum over keys
    # averages; in 16 bits, where only large scores have an error of a unit, one. Of that, dropout
    # leaves the share of the terms that it keeps. Beyond, it is added. An error beyond 1 isn't
    # small any more: exp's slope grows with it, and of three such errors (of the forward's product,
    # of the backward's, which may sum in another order, and of lse, which is as large) nothing
    # averages, as one key has the row.
    u = UNIT_ROUNDOFF[inputs["q"].dtype]
    summed = (q.abs() @ k.abs().transpose(-1, -2) * scale).masked_fill(~mask, 0.0)
    error = 2.0**-24 * summed.amax(-1, keepdim=True)
    error = torch.where(error > 1, torch.expm1(3 * error), error) / u
    covered = (32 if u == 2.0**-24 else 1) * (1 - dropout.threshold(inputs["p"]) / 65536)
    excess = (error - covered).clamp(min=0)
    plain = p if factor is None else p * factor
    wide = plain * excess
    found["dq"] += (sizes * excess) @ k.abs() * scale
    found["dk"] += (sizes * excess).transpose(-1, -2) @ q.abs() * scale
    for name in ("dq", "dk"):  # rotated back, which cancels once more
        found[name] = positions.sizes_back(found[name], rotary)
    found["dv"] = (plain.transpose(-1, -2) @ dout).abs() + wide.transpose(-1, -2) @ dout.abs()
    # In the forward the sum that divides has the same errors: of p what remains is at most twice
    # the error times 1 - p, which is zero where one key has all. And out lies between values.
    alone = torch.minimum(2 * (1 - p) * plain * excess, plain / u)
    found["out"] = (plain @ v).abs() + alone @ v.abs()
    found = {name: _packed_again(inputs, tensor) for name, tensor in found.items()}
    if bias is not None:  # a sum of ds over all scores of a distance
        found["dbias"] = positions.by_distance(sizes * (1 + excess), bias)
    return found


def plain_torch(inputs: dict) -> dict:
    """Results of stock torch in this dtype: one op after the other, each rounding."""
    q, k, v, dout, mask, factor = _padded(inputs, inputs["q"].dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    bias = _bias(inputs, "cpu", None)
    q, k = (positions.rotated(x, inputs["rotary"]) for x in leaves[:2])
    v, leaves = leaves[2], [*leaves, *bias]
    scores = _scores(inputs | {"distance_bias": bias[0] if bias else None}, q, k, mask)
    p = torch.where(mask.any(-1, keepdim=True), scores, 0.0).softmax(-1)
    p = p * mask.any(-1, keepdim=True)
    out = (p if factor is None else p * factor) @ v
    found = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    names = ("out", *GRADIENTS)
    return {
        n: t if n == "dbias" else _packed_again(inputs, t)
        for n, t in zip(names, found, strict=False)
    }
