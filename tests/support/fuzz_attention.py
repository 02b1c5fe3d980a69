"""A random call of attention, of three tensors or of one buffer, for the fuzz."""

import random
from collections.abc import Callable
from types import SimpleNamespace

import torch

from bertfast import checks, packing
from bertfast.ops import attention, attention_qkv, dispatch
from bertfast.ops.attention.scores import NO_LIMIT
from bertfast.testing import attention as attention_table
from bertfast.testing import positions

from . import bad_values
from .fuzz_calls import INVALID_SHARE, Call, draw_dtype, draw_size, hold_within, spoil
from .strides import relaid, relaid_alike

# The largest scores to be drawn, about.
LARGEST_SCORE = 3e4
# More of a table of positions than this is not made.
MOST_POSITIONS = 400
# The reference in float64 beside the same written out: sums in other orders, of large scores.
SAME = 1e-8


def attention_call(rng: random.Random, backend: str, one_buffer: bool = False) -> Call:
    op = "attention_qkv" if one_buffer else "attention"
    dtype = draw_dtype(rng, op, backend)
    case = _case(rng, op, backend, dtype)
    inputs = attention_table.make_inputs(case, dtype, rng.getrandbits(32))
    options = _layout(rng, case, inputs) | {"backend": backend}
    tensors = {name: inputs[name] for name in attention_table.NAMES}
    function = attention
    if one_buffer:
        function, tensors = attention_qkv, {"qkv": torch.stack(tuple(tensors.values()), -3)}
    spoilt = case.values == "spoilt"  # then a slice must not stand for others
    tensors = {n: (relaid_alike if spoilt else relaid)(rng, t) for n, t in tensors.items()}
    if one_buffer:
        parts = tensors["qkv"].unbind(-3)
        inputs |= dict(zip(attention_table.NAMES, parts, strict=True))
    else:
        if rng.random() < 0.1:  # one memory for several of them
            tensors["k"] = tensors[rng.choice("qv")]
        inputs |= tensors
    _positions(rng, case, inputs, options)
    inputs["dout"] = relaid(rng, inputs["dout"])
    if case.reach is not None:
        tensors["distance_bias"] = inputs["distance_bias"]
    plan = options["plan"] and ("plan of " + ("32" if options["plan"].tile == 32 else "64"))
    text = f"{op} {dtype} {case} max_seqlen={options['max_seqlen']} {plan or ''}"
    if rng.random() >= INVALID_SHARE:
        wanted = list(tensors)
        if rng.random() < 0.2:
            wanted = rng.sample(wanted, rng.randint(1, len(wanted)))
        text += f" gradients of {', '.join(wanted)}"
        return Call(text, lambda: _hold(function, tensors, options, inputs, wanted))
    return spoil(rng, text, function, tensors | options, _bad(rng, tensors, case))


def _lengths(rng: random.Random, backend: str) -> tuple[int, ...]:
    longest = rng.choice((8, 8, 40, 70, 140) if backend != "triton" else (8, 40, 70))
    return tuple(draw_size(rng, longest) for _ in range(rng.randint(1, 3)))


def _case(rng: random.Random, op: str, backend: str, dtype: torch.dtype) -> attention_table.Case:
    packed = rng.random() < 0.5
    lengths = _lengths(rng, backend)
    head_dim = rng.choice((8, 16, 32, 64, 64, 96, 128, rng.randint(1, 128)))
    mask = "none" if packed else rng.choice(("none", "right", "left", "holes", "all"))
    if not packed and mask == "none":
        lengths = (max(lengths),) * len(lengths)
    # A score is a sum of head_dim products of normal values: it rarely is above four deviations.
    scale = rng.choice((-1, 1)) * LARGEST_SCORE ** rng.random() / 4 / head_dim**0.5
    drawn: dict = {}
    if rng.random() < 0.6:
        drawn = {
            "rotary": rng.random() < 0.5,
            "window": _window(rng) if rng.random() < 0.5 else None,
            "reach": draw_size(rng, rng.choice((8, 140))) if rng.random() < 0.4 else None,
        }
        head_dim += head_dim % 2 * drawn["rotary"]
    case = attention_table.Case(
        lengths=lengths,
        heads=rng.randint(1, 2),
        head_dim=head_dim,
        mask=mask,
        packed=packed,
        p=rng.choice((0.0, 0.0, 0.1, 0.5, 1.0)),
        scale=rng.choice((None, None, scale, scale, 0.0)),
        values="spoilt" if mask != "none" and rng.random() < 0.3 else "normal",
        layout=rng.choice(("one buffer", "apart", "heads first")),
        **drawn,
    )
    asked = (op, backend, "cpu", dtype, head_dim, None, case.features)
    if case.features and dispatch.unsupported_reason(*asked):
        return attention_table.Case(**vars(case) | dict(rotary=False, window=None, reach=None))
    return case


def _window(rng: random.Random) -> tuple[int, int]:
    left, right = (draw_size(rng, 140) if rng.random() < 0.9 else NO_LIMIT for _ in range(2))
    return left, right


def _layout(rng: random.Random, case: attention_table.Case, inputs: dict) -> dict:
    """Mask or bounds with random strides; max_seqlen exact or generous; a plan or none."""
    options = attention_table.options(inputs) | {"seed": relaid_alike(rng, inputs["seed"])}
    if not case.packed:
        return options | {"key_mask": relaid_alike(rng, options["key_mask"])}
    more = (0, 0, 1, 70, *(() if case.rotary else (10_000, 2**31 - 1 - 10_000)))
    longest = max(case.lengths) + rng.choice(more)
    cu = relaid_alike(rng, options["cu_seqlens"])
    made = rng.choice(("none", "plan", "plan", "lay_out"))
    plan = None
    if made == "plan":
        plan = packing.plan(cu, longest, rng.choice((None, sum(case.lengths))))
    elif made == "lay_out":
        cu, plan = packing.lay_out(case.lengths)
        longest = plan.max_seqlen
    return options | {"cu_seqlens": cu, "max_seqlen": longest, "plan": plan}


def _positions(rng: random.Random, case: attention_table.Case, inputs: dict, options: dict) -> None:
    """Tables of more positions than are needed, and a bias of another dtype, in random memory."""
    if case.rotary:
        needed = max(case.lengths) if options["max_seqlen"] is None else options["max_seqlen"]
        base = rng.choice((1.0, 100.0, 10000.0, 160000.0))
        tables = positions.tables(needed + rng.choice((0, 0, 1, 50)), case.head_dim, base)
        if rng.random() < 0.1:
            tables = tables[:1] * 2
        tables = tuple(relaid_alike(rng, table) for table in tables)
        inputs["rotary"] = options["rotary"] = tables
        if rng.random() < 0.2:
            options["rotary"] = list(tables)
    if case.reach is not None:
        bias = inputs["distance_bias"]
        if rng.random() < 0.2:
            bias = bias.to(rng.choice(checks.FLOATS))
        inputs["distance_bias"] = relaid(rng, bias)
    if case.window is not None:  # a side without a limit by a number of any size
        huge = rng.choice((NO_LIMIT, 2**63, 10**400))
        sides = (huge if side == NO_LIMIT else side for side in case.window)
        options["window"] = rng.choice((tuple, list))(sides)


def _hold(
    function: Callable, tensors: dict, options: dict, inputs: dict, wanted: list[str]
) -> None:
    leaves = {name: tensor.detach() for name, tensor in tensors.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    out = function(**leaves, **options)
    grads = torch.autograd.grad(out, [leaves[name] for name in wanted], inputs["dout"])
    actual = {"out": out.detach()}
    for name, grad in zip(wanted, grads, strict=True):
        assert grad.shape == leaves[name].shape, name
        if name == "qkv":
            actual |= zip(("dq", "dk", "dv"), grad.unbind(-3), strict=True)
        elif name == "distance_bias":
            assert grad.dtype == leaves[name].dtype, name
            actual["dbias"] = grad.float() if grad.dtype == torch.float64 else grad
        else:
            actual[f"d{name}"] = grad
    assert out.shape == inputs["q"].shape
    if out.numel():
        hold_within(_table(actual), options["backend"], inputs, actual)
    elif "dbias" in actual:
        assert not actual["dbias"].any()


def _table(actual: dict) -> SimpleNamespace:
    """attention's table for some of its results. The oracle is the reference, which therefore is
    held to the same written out, by other code, in float64 as well."""

    def oracle(inputs: dict) -> dict:
        found = attention_table.oracle(inputs)
        doubled = {name: _double(value) for name, value in inputs.items() if name != "rotary"}
        same = attention_table.plain_torch(inputs | doubled)
        for name, right in found.items():
            size = max(1.0, right.abs().max().item())
            assert (same[name] - right).abs().max() <= SAME * size, f"the reference's {name}"
        return {name: found[name] for name in actual}

    return SimpleNamespace(
        oracle=oracle,
        rounding_model=attention_table.rounding_model,
        scales=attention_table.scales,
    )


def _double(value: object) -> object:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def _bad(rng: random.Random, tensors: dict, case: attention_table.Case) -> dict:
    first, *others = tensors
    bad = {name: bad_values.like_tensor(name, required=True) for name in others}
    bad |= {first: bad_values.first_tensor(first), "scale": bad_values.scale}
    bad |= dict(site=bad_values.site, dropout_p=bad_values.dropout_p, seed=bad_values.seed)
    bad |= dict(rotary=bad_values.rotary, window=bad_values.window)
    bad |= dict(distance_bias=bad_values.distance_bias, backend=bad_values.name)

    def plan(rng: random.Random, call: dict) -> object:
        other, longest = (*case.lengths[:-1], case.lengths[-1] + 1), call["max_seqlen"]
        return rng.choice([*bad_values.NO_TENSOR, packing.lay_out(other)[1]]) if longest else "x"

    if case.packed:
        bad |= dict(cu_seqlens=bad_values.cu_seqlens, max_seqlen=bad_values.max_seqlen, plan=plan)
        bad["key_mask"] = lambda rng, call: torch.ones(2, 2, dtype=torch.bool)
    else:
        bad["key_mask"] = bad_values.key_mask
        bad["cu_seqlens"] = lambda rng, call: torch.tensor([0, 1], dtype=torch.int32)
        bad |= dict(max_seqlen=lambda rng, call: 3, plan=lambda rng, call: packing.lay_out([1])[1])
    return bad
