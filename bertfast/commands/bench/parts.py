"""The time of a layer by its parts: products, attention and the rest, each timed apart.

A part runs on the shapes that it has in a layer's forward. Their sum is the layer without what lies
between its kernels. The ops' numbers are checked where the ops are measured.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ... import ops
from ...ops.linear import run as linear_gelu
from . import floor
from .case import normal
from .ceilings import Machine
from .encoder import EncoderCase
from .models import Model, Tokens
from .record import Recorder, Row, dtype_name
from .timing import graph_timer, interleaved, process_timer


class _Layer:
    """The tensors of one layer."""

    def __init__(self, model: Model, tokens: Tokens, device: str, dtype: torch.dtype) -> None:
        values = normal(device, 0, dtype)
        rows, length = len(tokens.lengths), tokens.longest
        width, inner, heads = model.width, model.inner, model.heads
        self.x, self.h = values(rows, length, width), values(rows, length, inner)
        self.qkv = values(rows, length, 3, heads, width // heads)
        self.joined, self.out = values(3 * width, width), values(width, width)
        self.up, self.down = values(inner, width), values(width, inner)
        self.bias, self.inner_bias, self.one = values(width), values(inner), 1 + values(width)


def _ours(t: _Layer) -> dict[str, Callable]:
    norm = functools.partial(
        ops.layer_norm, t.x, t.one, t.bias, residual=t.x, x_bias=t.bias, eps=1e-12
    )
    # Where one kernel makes a product and its GELU, it is a product.
    inner, width = t.up.shape
    rows = t.x.numel() // width
    chosen = linear_gelu.choose("auto", t.x.device, t.x.dtype, (width, inner, rows))
    in_one = chosen.forward is not None

    def up() -> torch.Tensor:
        return ops.linear_gelu(t.x, t.up, t.inner_bias) if in_one else F.linear(t.x, t.up)

    def gelu() -> torch.Tensor | None:
        return None if in_one else ops.bias_gelu(t.h, t.inner_bias)

    return {
        "products": lambda: (
            *(F.linear(t.x, t.joined), F.linear(t.x, t.out)),
            *(up(), F.linear(t.h, t.down)),
        ),
        "attention": lambda: ops.attention_qkv(t.qkv),
        "memory": lambda: (norm(), gelu(), norm()),
    }


def _stock(t: _Layer) -> dict[str, Callable]:
    """The calls of Hugging Face's layer with SDPA."""
    q, k, v = (part.transpose(1, 2).contiguous() for part in t.qkv.unbind(2))
    query = t.joined[: t.out.shape[0]]

    def norm() -> torch.Tensor:
        return F.layer_norm(t.x + t.x, t.bias.shape, t.one, t.bias, 1e-12)

    return {
        "products": lambda: (
            *(F.linear(t.x, weight, t.bias) for weight in (query, query, query, t.out)),
            F.linear(t.x, t.up, t.inner_bias),
            F.linear(t.h, t.down, t.bias),
        ),
        "attention": lambda: F.scaled_dot_product_attention(q, k, v),
        "memory": lambda: (norm(), F.gelu(t.h), norm()),
    }


def measure_parts(
    machine: Machine, recorder: Recorder, case: EncoderCase, repeats: int = 7
) -> None:
    """A row for each part of a layer, by bertfast and by the calls of Hugging Face's with SDPA."""
    tensors = _Layer(case.model, case.tokens, machine.device, case.dtype)
    stream = torch.cuda.Stream() if machine.device == "cuda" else None
    timers = {}
    with torch.no_grad():
        for provider, parts in (("bertfast", _ours(tensors)), ("HF SDPA", _stock(tensors))):
            for kind, call in parts.items():
                timer = graph_timer([call], stream) if stream else process_timer([call])
                timers[provider, kind] = timer
        samples = interleaved(timers, repeats)
    work = floor.forward(case.model, case.tokens.lengths, case.dtype.itemsize)
    limits = machine.ceilings(case.dtype)
    for (provider, kind), sample in samples.items():
        row = Row(provider, f"{case.op} {kind}", "forward", case.shape, dtype_name(case.dtype))
        row.clock, row.cache = machine.clock, "warm"
        row.floor_us = floor.floor_us([part for part in work if part.kind == kind], limits)
        recorder.add(row.timed(sample))
