"""Random calls of linear_gated: fuzz.py's, as linear_gelu's."""

import random

import torch

from bertfast.ops import linear_gated
from bertfast.ops.gated.limits import ACTIVATIONS
from bertfast.testing import linear_gated as gated_product_table

from . import bad_values
from .fuzz_calls import INVALID_SHARE, Call, draw_dtype, draw_size, hold_within, spoil
from .strides import relaid

NAMES = ("x", "weight", "bias", "dy", "down")


def linear_gated_call(rng: random.Random, backend: str) -> Call:
    """The op's y; u and the backward by the node's calls, which the table makes. A node's tensors
    are in memory as they are: what is lazily negated goes to the registered op."""
    fused = rng.choice((None, False) if backend == "torch" else (True, True, False, None))
    dtype = draw_dtype(rng, "linear_gated" if fused else "gated", backend)
    widths = [8 * rng.randint(1, 20) if fused else max(1, draw_size(rng, 130)) for _ in "ab"]
    rows = draw_size(rng, 40 if backend == "triton" else 140)
    case = gated_product_table.Case(
        *(rows, *widths),
        bias=rng.random() < 0.7,
        activation=rng.choice(ACTIVATIONS),
        values=rng.choice(("normal", "normal", "wide", "zero")),
        kernels=1 if fused else 2,
    )
    inputs = gated_product_table.make_inputs(case, dtype, rng.getrandbits(32))
    for name in NAMES:
        inputs[name] = relaid(rng, inputs[name])
    lead = rng.choice(((rows,), (1, rows), (rows, 1)))
    arguments = dict(x=inputs["x"].reshape(*lead, case.inputs), weight=inputs["weight"])
    arguments |= dict(activation=case.activation, fused=fused, backend=backend)
    if case.bias:
        arguments["bias"] = inputs["bias"]
    text = f"linear_gated {dtype} {case} fused={fused}"
    if rng.random() >= INVALID_SHARE:

        def hold() -> None:
            y = linear_gated(**arguments)
            assert y.shape == (*lead, case.width)
            found = {"y": y.reshape(rows, case.width)}
            given = {name: inputs[name].resolve_neg() for name in NAMES if inputs[name] is not None}
            rest = gated_product_table.run(inputs | given, backend)
            found |= {name: rest[name] for name in rest if name != "y"}
            hold_within(gated_product_table, backend, inputs, found)

        return Call(text, hold)
    if rng.random() < 0.3:  # a width that the kernel can't have, or an odd one
        more = rng.choice((2, 4, 6)) if fused else 1
        weight = torch.zeros(2 * case.width + more, case.inputs, dtype=dtype)
        wrong = {name: arguments[name] for name in arguments if name != "bias"} | {"weight": weight}
        named = "fused" if fused else "weight"
        return Call(f"{text} of {weight.shape[0]}", lambda: linear_gated(**wrong), named)
    bad = dict(x=bad_values.first_tensor("x"), weight=bad_values.like_tensor("weight", True))
    bad |= dict(activation=bad_values.name, backend=bad_values.name, fused=bad_values.no_bool)
    if case.bias:
        bad["bias"] = bad_values.like_tensor("bias", required=False)
    return spoil(rng, text, linear_gated, arguments, bad)
