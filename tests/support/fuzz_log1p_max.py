"""A random call of linear_log1p_max, for the fuzz."""

import random

from bertfast.ops import linear_log1p_max
from bertfast.testing import linear_log1p_max as max_table

from . import bad_values
from .fuzz_calls import INVALID_SHARE, Call, draw_dtype, draw_size, hold_within, spoil
from .strides import relaid


def linear_log1p_max_call(rng: random.Random, backend: str) -> Call:
    case = max_table.Case(
        lengths=tuple(draw_size(rng, 20) for _ in range(rng.randint(0, 3))),
        width=max(1, draw_size(rng, 70)),
        vocabulary=max(1, draw_size(rng, 140)),
        layout=rng.choice(("padded", "masked", "holes", "packed")),
        bias=rng.random() < 0.7,
    )
    dtype = draw_dtype(rng, "linear_log1p_max", backend)
    inputs = max_table.make_inputs(case, dtype, rng.getrandbits(32))
    for name in max_table.NAMES:
        other = relaid(rng, inputs[name])
        # Of other values, as where rows share their memory, rounding may choose the largest.
        if other is not None and other.nan_to_num().equal(inputs[name].nan_to_num()):
            inputs[name] = other
    text = f"linear_log1p_max {dtype} {case}"
    if rng.random() >= INVALID_SHARE:
        return Call(
            text, lambda: hold_within(max_table, backend, inputs, max_table.run(inputs, backend))
        )
    arguments = {name: inputs[name] for name in max_table.NAMES}
    arguments |= inputs["options"] | {"backend": backend}
    bad = dict(x=bad_values.first_tensor("x"), weight=bad_values.like_tensor("weight", True))
    bad |= dict(backend=bad_values.name)
    if case.bias:
        bad["bias"] = bad_values.like_tensor("bias", required=False)
    return spoil(rng, text, linear_log1p_max, arguments, bad)
