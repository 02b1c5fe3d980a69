"""Random calls of the ops, valid and invalid, and what each has to give.

A valid call gives float64's result within the error budget, forward and gradients. An invalid one,
which is a valid one with one bad argument, raises TypeError or ValueError and names the argument.
A call is made from (seed, op, backend, number) alone, so that each can be repeated by itself.
"""

import functools
import math
import random
import re
from collections.abc import Callable

import torch

from bertfast import packing
from bertfast.ops import (
    bias_gelu,
    dropout,
    dropout_keep_mask,
    gated,
    layer_norm,
    linear_cross_entropy,
    linear_gelu,
    rms_norm,
)
from bertfast.ops.gated.limits import ACTIVATIONS
from bertfast.testing import bias_gelu as gelu_table
from bertfast.testing import gated as gated_table
from bertfast.testing import layer_norm as norm_table
from bertfast.testing import linear_cross_entropy as loss_table
from bertfast.testing import linear_gelu as linear_table

from . import bad_values
from .fuzz_attention import attention_call
from .fuzz_calls import (
    INVALID_SHARE,
    TORCH_LEAST_WIDTH,
    Call,
    draw_dtype,
    draw_shape,
    draw_size,
    hold_within,
    spoil,
)
from .fuzz_linear_gated import linear_gated_call
from .fuzz_log1p_max import linear_log1p_max_call
from .strides import relaid, relaid_alike


def attempt(op: str, backend: str, seed: int, number: int) -> str | None:
    """Makes a call and runs it. What was wrong with it, or None."""
    rng = random.Random(f"{seed} {op} {backend} {number}")
    call = CALLS[op](rng, backend)
    try:
        call.run()
    except (TypeError, ValueError) as error:
        if call.bad is None:
            return f"{call.text} raised {error!r}"
        if not re.search(rf"\b{call.bad}\b", str(error)):
            return f"{call.text} didn't name {call.bad}: {error!r}"
    except Exception as error:
        return f"{call.text} raised {error!r}"
    else:
        if call.bad is not None:
            return f"{call.text} was accepted"
    return None


# layer_norm


def _layer_norm(rng: random.Random, backend: str) -> Call:
    dtype = draw_dtype(rng, "layer_norm", backend)
    shape = draw_shape(rng, backend, TORCH_LEAST_WIDTH if backend == "torch" else 1)
    residual = rng.random() < 0.5
    p = rng.choice((0.0, 0.0, 0.1, 0.5, 0.999, 1.0, rng.random()))
    # An error of the mean is shared by its row: over some rows the model's is a fair yardstick.
    many = math.prod(shape[:-1]) >= 8 and p <= 0.5
    values = ["normal", "normal", "near constant", *["offset"] * many]
    values = rng.choice(values + ["tiny"] * (dtype != torch.float16))  # its gradients overflow
    # What is constant, or nearly so, is divided by sqrt(eps): with 1e-12 float16 overflows, and
    # the values' own rounding, times a million, is all that is left.
    varies = values in ("normal", "offset") and (p <= 0.5 or residual)
    case = norm_table.Case(
        shape=shape,
        residual=residual,
        x_bias=rng.random() < 0.5,
        p=p,
        eps=rng.choice((1e-12, 1e-5, 1.0) if varies else (1e-5, 1.0)),
        values=values,
        row_index=rng.random() < 0.3,
        # On a CPU a 16-bit x alone gives a 16-bit output; only a float32 residual makes it float32.
        x_is_16_bit=residual and dtype == torch.float32 and rng.random() < 0.3,
        bias=rng.random() < 0.8,
        rms=rng.random() < 0.2,
        return_sum=rng.random() < 0.3,
    )
    inputs = norm_table.make_inputs(case, dtype, rng.getrandbits(32))
    for name in (*norm_table.NAMES, "dy", "dsum", "row_index"):
        inputs[name] = relaid(rng, inputs[name])
    text = f"layer_norm {dtype} {case}"
    if rng.random() >= INVALID_SHARE:
        return Call(
            text,
            lambda: hold_within(norm_table, backend, inputs, norm_table.run(inputs, backend)),
        )
    given = [name for name in norm_table.NAMES if inputs[name] is not None]
    arguments = {name: inputs[name].to(dtype) for name in given}
    arguments |= dict(eps=inputs["eps"], dropout_p=inputs["p"], seed=inputs["seed"], site=5)
    arguments |= dict(row_index=inputs["row_index"], backend=backend)
    arguments |= dict(return_sum=case.return_sum)
    bad = {name: bad_values.like_tensor(name, name == "weight") for name in given[1:]}
    bad |= dict(x=bad_values.first_tensor("x"), eps=bad_values.eps, seed=bad_values.seed)
    bad |= dict(site=bad_values.site, dropout_p=bad_values.dropout_p, backend=bad_values.name)
    bad |= dict(row_index=bad_values.row_index, return_sum=bad_values.no_bool)
    norm = rms_norm if case.rms else functools.partial(layer_norm, bias=None)
    return spoil(rng, text, norm, arguments, bad)


# bias_gelu


def _bias_gelu(rng: random.Random, backend: str) -> Call:
    dtype = draw_dtype(rng, "bias_gelu", backend)
    bias = rng.random() < 0.7
    shape = draw_shape(rng, backend, 0)
    if not bias and rng.random() < 0.1:
        shape = ()
    case = gelu_table.Case(
        shape=shape,
        bias=bias,
        approximate=rng.choice(("none", "tanh")),
        # 1 + erf cancels in the tail, in torch too: there its size is a yardstick for many only.
        values=rng.choice(("normal", "wide", "tiny", "zero", *["tail"] * (math.prod(shape) > 99))),
        x_is_16_bit=bias and dtype == torch.float32 and rng.random() < 0.2,
    )
    inputs = gelu_table.make_inputs(case, dtype, rng.getrandbits(32))
    for name in (*gelu_table.NAMES, "dy"):
        inputs[name] = relaid(rng, inputs[name])
    text = f"bias_gelu {dtype} {case}"
    if rng.random() >= INVALID_SHARE:
        return Call(
            text,
            lambda: hold_within(gelu_table, backend, inputs, gelu_table.run(inputs, backend)),
        )
    arguments = dict(x=inputs["x"].to(dtype), approximate=case.approximate, backend=backend)
    bad = dict(x=bad_values.first_tensor("x"), approximate=bad_values.name)
    bad |= dict(backend=bad_values.name)
    if bias:
        arguments["bias"] = inputs["bias"]
        bad["bias"] = bad_values.like_tensor("bias", required=False)
    return spoil(rng, text, bias_gelu, arguments, bad)


# gated


def _gated(rng: random.Random, backend: str) -> Call:
    dtype = draw_dtype(rng, "gated", backend)
    shape = draw_shape(rng, backend, 0)
    case = gated_table.Case(
        shape=shape,
        bias=rng.random() < 0.5,
        activation=rng.choice(ACTIVATIONS),
        activated=rng.choice(("first", "second")),
        values=rng.choice(("normal", "wide", "tiny", "zero", *["tail"] * (math.prod(shape) > 99))),
    )
    inputs = gated_table.make_inputs(case, dtype, rng.getrandbits(32))
    for name in (*gated_table.NAMES, "dy"):
        inputs[name] = relaid(rng, inputs[name])
    text = f"gated {dtype} {case}"
    if rng.random() >= INVALID_SHARE:
        return Call(
            text,
            lambda: hold_within(gated_table, backend, inputs, gated_table.run(inputs, backend)),
        )
    arguments = {name: inputs[name] for name in ("x", "activation", "activated")}
    arguments["backend"] = backend
    bad = dict(x=bad_values.first_tensor("x"), activation=bad_values.name)
    bad |= dict(activated=bad_values.name, backend=bad_values.name)
    if case.bias:
        arguments["bias"] = inputs["bias"]
        bad["bias"] = bad_values.like_tensor("bias", required=False)
    return spoil(rng, text, gated, arguments, bad)


# linear_gelu


def _linear_gelu(rng: random.Random, backend: str) -> Call:
    """The op's y; u and the backward by the node's calls, which the table makes. A node's tensors
    are in memory as they are: what is lazily negated goes to the registered op."""
    fused = rng.choice((None, False) if backend == "torch" else (True, True, False, None))
    dtype = draw_dtype(rng, "linear_gelu" if fused else "bias_gelu", backend)
    widths = [8 * rng.randint(1, 20) if fused else max(1, draw_size(rng, 130)) for _ in "ab"]
    rows = draw_size(rng, 40 if backend == "triton" else 140)
    case = linear_table.Case(
        *(rows, *widths),
        bias=rng.random() < 0.7,
        approximate=rng.choice(("none", "tanh")),
        values=rng.choice(("normal", "normal", "wide", "zero")),
        kernels=1 if fused else 2,
    )
    inputs = linear_table.make_inputs(case, dtype, rng.getrandbits(32))
    names = ("x", "weight", "bias", "dy", "down")
    for name in names:
        inputs[name] = relaid(rng, inputs[name])
    lead = rng.choice(((rows,), (1, rows), (rows, 1)))
    arguments = dict(x=inputs["x"].reshape(*lead, case.inputs), weight=inputs["weight"])
    arguments |= dict(approximate=case.approximate, fused=fused, backend=backend)
    if case.bias:
        arguments["bias"] = inputs["bias"]
    text = f"linear_gelu {dtype} {case} fused={fused}"
    if rng.random() >= INVALID_SHARE:

        def hold() -> None:
            y = linear_gelu(**arguments)
            assert y.shape == (*lead, case.outputs)
            found = {"y": y.reshape(rows, case.outputs)}
            given = {name: inputs[name].resolve_neg() for name in names if inputs[name] is not None}
            rest = linear_table.run(inputs | given, backend)
            hold_within(
                linear_table, backend, inputs, found | {n: rest[n] for n in rest if n != "y"}
            )

        return Call(text, hold)
    if fused and rng.random() < 0.3:  # a width that the kernel can't have
        weight = torch.zeros(case.outputs + rng.randint(1, 7), case.inputs, dtype=dtype)
        wrong = {name: arguments[name] for name in arguments if name != "bias"} | {"weight": weight}
        return Call(f"{text} of {weight.shape[0]}", lambda: linear_gelu(**wrong), "fused")
    bad = dict(x=bad_values.first_tensor("x"), weight=bad_values.like_tensor("weight", True))
    bad |= dict(approximate=bad_values.name, backend=bad_values.name, fused=bad_values.no_bool)
    if case.bias:
        bad["bias"] = bad_values.like_tensor("bias", required=False)
    return spoil(rng, text, linear_gelu, arguments, bad)


# linear_cross_entropy


def _linear_cross_entropy(rng: random.Random, backend: str) -> Call:
    case = loss_table.Case(
        rows=max(1, draw_size(rng, 9 if backend == "triton" else 140)),
        width=max(1, draw_size(rng, 70)),
        vocabulary=max(1, draw_size(rng, 1100 if rng.random() < 0.2 else 130)),
        share=rng.choice((0.0, 0.3, 1.0)),
        bias=rng.random() < 0.7,
        reduction=rng.choice(("mean", "sum", "none")),
        smoothing=rng.choice((0.0, 0.0, 0.1, 1.0)),
    )
    dtype = draw_dtype(rng, "linear_cross_entropy", backend)
    inputs = loss_table.make_inputs(case, dtype, rng.getrandbits(32))
    for name in loss_table.NAMES:
        inputs[name] = relaid(rng, inputs[name])
    count = int((inputs["labels"] != loss_table.IGNORED).sum())
    inputs["labelled"] = rng.choice((None, count, count + 1, case.rows, 10**6))
    text = f"linear_cross_entropy {dtype} {case} labelled={inputs['labelled']}"
    if rng.random() >= INVALID_SHARE:
        return Call(
            text, lambda: hold_within(loss_table, backend, inputs, loss_table.run(inputs, backend))
        )
    arguments = {name: inputs[name] for name in (*loss_table.NAMES, "labels", "labelled")}
    arguments |= inputs["options"] | {"backend": backend}
    bad = dict(hidden=bad_values.first_tensor("hidden"), labels=bad_values.labels)
    bad |= dict(weight=bad_values.like_tensor("weight", True), labelled=bad_values.labelled)
    bad |= dict(reduction=bad_values.name, label_smoothing=bad_values.dropout_p)
    bad |= dict(ignore_index=bad_values.no_int, backend=bad_values.name)
    if case.bias:
        bad["bias"] = bad_values.like_tensor("bias", required=False)
    return spoil(rng, text, linear_cross_entropy, arguments, bad)


# plans and masks


def _plan(rng: random.Random, backend: str) -> Call:
    lengths = tuple(draw_size(rng, rng.choice((4, 40, 200))) for _ in range(rng.randint(0, 12)))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths, default=0) + rng.choice((0, 0, 1, 100, 10_000))
    total = rng.choice((None, sum(lengths)))
    arguments = dict(cu_seqlens=relaid_alike(rng, cu), max_seqlen=longest, total=total)
    text = f"packing.plan {lengths} max_seqlen={longest} total={total}"
    if rng.random() >= INVALID_SHARE:
        return Call(text, lambda: _held_plan(packing.plan(**arguments), lengths))
    bad = dict(cu_seqlens=bad_values.cu_seqlens, max_seqlen=bad_values.max_seqlen)
    return spoil(rng, text, packing.plan, arguments, bad | dict(total=bad_values.total))


def _held_plan(plan: packing.Plan, lengths: tuple[int, ...]) -> None:
    """Each token lies in one tile, and a tile that several sequences share holds them whole."""
    cu, laid_out = packing.lay_out(lengths)
    bounds, covered = cu.tolist(), [0] * sum(lengths)
    for sequence, first, many in plan.tiles[: int(plan.count)].tolist():
        start, end = bounds[sequence], bounds[sequence + many]
        assert many == 1 or end - start <= plan.tile, (sequence, first, many)
        for token in range(start + first, min(start + first + plan.tile, end)):
            covered[token] += 1
    assert set(covered) <= {1}, covered
    assert not plan.tiles[int(plan.count) :].any()
    assert (plan.runs, plan.total) == (laid_out.runs, laid_out.total)


def _dropout_keep_mask(rng: random.Random, backend: str) -> Call:
    kind = rng.choice(dropout.KINDS)
    count = 4 if kind == "attention" else rng.randint(1, 4)
    shape = tuple(draw_size(rng, 12 if place < count - 2 else 40) for place in range(count))
    seed = torch.tensor([rng.getrandbits(64) - 2**63])
    arguments = dict(seed=seed, site=rng.choice((0, rng.getrandbits(31))), shape=shape)
    arguments |= dict(p=rng.choice((0.0, 0.1, 0.5, 1.0, rng.random())), kind=kind)
    text = f"dropout_keep_mask {arguments}"
    if rng.random() >= INVALID_SHARE:
        return Call(text, lambda: _held_mask(rng, **arguments))
    negative = tuple(-1 if place == count - 1 else size for place, size in enumerate(shape))
    shapes = (None, 3, "ab", (), negative, (*shape[1:], 2.0), (*shape[1:], True), [[1]])
    bad = dict(seed=bad_values.seed, site=bad_values.site, p=bad_values.dropout_p)
    bad |= dict(kind=bad_values.name, shape=lambda rng, call: rng.choice(shapes))
    return spoil(rng, text, dropout_keep_mask, arguments, bad)


def _held_mask(
    rng: random.Random, seed: torch.Tensor, site: int, shape: tuple[int, ...], p: float, kind: str
) -> None:
    """A few of its values are those of a Philox in plain Python, by what ops/dropout.py says."""
    mask = dropout_keep_mask(seed, site, shape, p, kind)
    assert mask.shape == shape and mask.dtype == torch.bool
    for _ in range(20 if mask.numel() else 0):
        at = tuple(rng.randrange(size) for size in shape)
        if kind == "row":
            row = 0
            for size, index in zip(shape[:-1], at[:-1], strict=True):
                row = row * size + index
            counters, draw = (at[-1] >> 3, row & 0xFFFFFFFF, row >> 32, site), at[-1] & 7
        else:
            b, h, i, j = at
            counters = ((j >> 5) << 3 | j & 7, (i >> 4) << 3 | i & 7, b * shape[1] + h, site)
            draw = ((i >> 3) & 1) * 4 + ((j >> 3) & 3)
        word = _philox(counters, int(seed) & 2**64 - 1)[draw >> 1]
        kept = (word >> 16 * (draw & 1) & 0xFFFF) >= round(65536 * p)
        assert mask[at].item() is kept, at


def _philox(counters: tuple[int, ...], seed: int) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counters
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(7):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF
        c2, c3 = (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


CALLS: dict[str, Callable[[random.Random, str], Call]] = {
    "layer_norm": _layer_norm,
    "bias_gelu": _bias_gelu,
    "gated": _gated,
    "linear_gelu": _linear_gelu,
    "linear_gated": linear_gated_call,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_log1p_max": linear_log1p_max_call,
    "attention": attention_call,
    "attention_qkv": lambda rng, backend: attention_call(rng, backend, one_buffer=True),
    "plan": _plan,
    "dropout_keep_mask": _dropout_keep_mask,
}
