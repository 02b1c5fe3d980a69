"""The bindings of the CUDA kernels refuse memory that isn't what a kernel takes it for."""

import re
from collections.abc import Callable

import pytest
import torch

from bertfast import packing
from bertfast.ops.attention import run as attention
from bertfast.ops.attention.scores import Scores
from bertfast.ops.dropout import NO_DROPOUT, Dropout
from bertfast.ops.layer_norm import run as layer_norm
from bertfast.packing.sequences import Sequences

pytestmark = pytest.mark.host

ROWS, WIDTH = 6, 24


@pytest.fixture
def host():
    return pytest.importorskip("bertfast._host")


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same values with a gap after each."""
    return torch.stack([x, x], -1)[..., 0]


def columns_apart(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


def off(x: torch.Tensor) -> torch.Tensor:
    """The same values, one element into their memory."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def longer(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x])


def shorter(x: torch.Tensor) -> torch.Tensor:
    return x[:-1]


def as_double(x: torch.Tensor) -> torch.Tensor:
    return x.double()


def as_half(x: torch.Tensor) -> torch.Tensor:
    return x.half()


def as_int(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.int16)


DENSE = (apart, longer, shorter, as_double, as_int)
OF_ROWS = (columns_apart, longer, as_double)


class Call:
    """A call by names, of which each stands for a place in the arguments or in a tuple of them."""

    def __init__(self, host, function: str, arguments: dict[str, object]) -> None:
        self.function, self.arguments = getattr(host, function), arguments

    def __call__(self, name: str | None = None, spoil: Callable = lambda x: x) -> object:
        found, arguments = name is None, []
        for key, value in self.arguments.items():
            if key == name:
                value, found = spoil(value), True
            elif name in getattr(value, "_fields", ()):
                value, found = value._replace(**{name: spoil(getattr(value, name))}), True
            arguments.append(value)
        assert found, name
        return self.function(*arguments)


def refused(call: Call, cases: dict[str, tuple[Callable, ...]]) -> None:
    call()  # as it is, it runs
    for name, spoils in cases.items():
        for spoil in spoils:
            with pytest.raises(AssertionError, match="a kernel reads .* as .*; it is .* shape"):
                call(name, spoil)
                pytest.fail(f"{name} {spoil.__name__} was taken")


def dropout(**rest) -> Dropout:
    return Dropout(torch.zeros(1, dtype=torch.int64), 6554, 65536 / (65536 - 6554), 3, **rest)


def new(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def test_layer_norm_forward(host):
    call = Call(
        host,
        "layer_norm_forward",
        {
            "x": new(ROWS, WIDTH),
            "residual": new(ROWS, WIDTH),
            "x_bias": new(WIDTH),
            "norm": layer_norm.Norm(new(WIDTH), new(WIDTH), 1e-12),
            "dropout": dropout(rows=torch.arange(ROWS)),
            "outs": layer_norm.Outputs(new(ROWS, WIDTH), new(ROWS, WIDTH), new(ROWS), new(ROWS)),
        },
    )
    rows = dict.fromkeys(("x", "residual"), (*OF_ROWS, as_half))
    rows["x"] = OF_ROWS  # in half precision it may be, under a wider y
    dense = dict.fromkeys(
        ("x_bias", "weight", "bias", "seed", "rows", "mean", "rstd"), (*DENSE[:2], as_half)
    )
    refused(call, rows | dense | {"y": (*OF_ROWS, as_half), "z": OF_ROWS, "seed": (longer,)})


def test_layer_norm_backward(host):
    dy = new(ROWS, WIDTH)
    grads = layer_norm.Gradients(dy.clone(), dy.clone(), *new(3, WIDTH))
    call = Call(
        host,
        "layer_norm_backward",
        {
            "dy": dy,
            "dsum": new(ROWS, WIDTH),
            "saved": layer_norm.Saved(new(ROWS, WIDTH), new(ROWS), new(ROWS)),
            "weight": new(WIDTH),
            "dropout": dropout(rows=None),
            "grads": grads,
            "partial": new(*host.layer_norm_partial_shape(dy, grads)),
        },
    )
    names = ("mean", "rstd", "weight", "dweight", "dbias", "dx_bias")
    cases = dict.fromkeys(names, (*DENSE, as_half))
    cases |= dict.fromkeys(("dz", "dx"), OF_ROWS)
    cases |= dict.fromkeys(("dy", "dsum", "z"), OF_ROWS)
    refused(call, cases | {"partial": (shorter, as_half)})


@pytest.mark.parametrize("biased", [True, False])
def test_bias_gelu(host, biased):
    x, bias = new(ROWS, WIDTH), new(WIDTH) if biased else None
    call = Call(
        host,
        "bias_gelu_forward",
        {"x": x, "bias": bias, "tanh": False, "y": new(ROWS, WIDTH)},
    )
    cases = {"x": OF_ROWS, "y": (*OF_ROWS, as_half)}
    refused(call, cases | ({"bias": (*DENSE, as_half)} if biased else {}))
    call = Call(
        host,
        "bias_gelu_backward",
        {
            "dy": new(ROWS, WIDTH),
            "x": x,
            "bias": bias,
            "tanh": True,
            "dx": new(ROWS, WIDTH),
            "dbias": new(WIDTH) if biased else None,
            "partial": new(*host.bias_gelu_partial_shape(x)),
        },
    )
    cases = {"x": OF_ROWS, "dy": (*OF_ROWS, as_half), "dx": OF_ROWS}
    more = {"bias": DENSE, "dbias": (*DENSE, as_half), "partial": (as_half,)}
    refused(call, cases | (more if biased else {}))


@pytest.mark.parametrize("biased", [True, False])
def test_gated(host, biased):
    x, y, bias = new(ROWS, 2 * WIDTH), new(ROWS, WIDTH), new(2 * WIDTH) if biased else None
    form = {"activation": 2, "second": True}
    call = Call(host, "gated_forward", {"x": x, "bias": bias} | form | {"y": y})
    cases = {"x": (*OF_ROWS, as_half), "y": (*DENSE, as_half)}
    refused(call, cases | ({"bias": (*DENSE, as_half)} if biased else {}))
    call = Call(
        host,
        "gated_backward",
        {"dy": y, "x": x, "bias": bias}
        | form
        | {
            "dx": new(ROWS, 2 * WIDTH),
            "dbias": new(2 * WIDTH) if biased else None,
            "partial": new(*host.gated_partial_shape(y)),
        },
    )
    cases = {"x": (*OF_ROWS, as_half), "dy": (*OF_ROWS, as_half), "dx": (*OF_ROWS, as_half)}
    more = {"bias": (*DENSE, as_half), "dbias": (*DENSE, as_half), "partial": (as_half,)}
    refused(call, cases | (more if biased else {}))


HEADS, DIM = 2, 16
PADDED = Sequences()
SCORES = Scores(0.25)


def heads(*places: int) -> torch.Tensor:
    return torch.randn(*places, HEADS, DIM).bfloat16()


def wider_heads(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x], -1)


def dims_apart(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], -1)[..., 0]


OF_HEADS = (dims_apart, longer, wider_heads, as_half)


@pytest.mark.parametrize("layout", ["masked", "packed", "planned"])
def test_attention(host, layout):
    if layout == "masked":
        places, lse = (2, 20), new(2, HEADS, 20)
        sequences = Sequences(torch.ones(2, 20, dtype=torch.bool))
        cases = {"key_mask": (columns_apart, longer, lambda mask: mask.int())}
    else:
        places, lse = (25,), new(HEADS, 25)
        bounds = torch.tensor([0, 5, 25], dtype=torch.int32)
        sequences = Sequences(None, bounds, 20)
        cases = {"cu_seqlens": (apart, torch.Tensor.long)}
        if layout == "planned":
            plan = packing.plan(bounds, 20)
            sequences = sequences._replace(tiles=plan.tiles, tile=plan.tile)
            cases["tiles"] = (apart, torch.Tensor.long, torch.Tensor.flatten)
    three = attention.Heads(*(heads(*places) for _ in range(3)))
    out = heads(*places)
    arguments = {
        "heads": three,
        "sequences": sequences,
        "scores": SCORES,
        "dropout": dropout(rows=None),
        "out": out,
        "lse": lse,
    }
    cases |= dict.fromkeys(("q", "k", "v", "out"), OF_HEADS)
    cases |= {"lse": (apart, longer, as_double), "seed": (longer, as_int)}
    if layout == "masked":
        cases["q"] = (dims_apart, wider_heads, as_half)  # the longer one contradicts the mask
    refused(Call(host, "attention_forward", arguments), cases)
    grads = {f"d{name}": heads(*places) for name in ("q", "k", "v")}
    arguments = {
        "dout": heads(*places),
        "heads": three,
        "saved": attention.Saved(out, lse),
        "sequences": sequences,
        "scores": SCORES,
        "dropout": NO_DROPOUT,
        "grads": attention.Heads(*grads.values()),
        "statistics": new(*lse.shape, 2),
    }
    del cases["seed"], cases["q"]
    more = {"dout": OF_HEADS, "statistics": (longer, as_double, apart)}
    refused(Call(host, "attention_backward", arguments), cases | more)


def test_attentions_gradient_of_a_bias(host):
    shape = host.attention_bias_partial_shape(2, 20, HEADS)
    assert shape == (2, 2, HEADS, 256)
    arguments = {
        "dout": heads(2, 20),
        "heads": attention.Heads(*(heads(2, 20) for _ in range(3))),
        "sequences": PADDED,
        "scores": SCORES._replace(bias=new(HEADS, 5)),
        "dropout": NO_DROPOUT,
        "statistics": new(2, HEADS, 20, 2),
        "partial": torch.zeros(shape),
        "line": new(*shape[2:]),
    }
    cases = dict.fromkeys(("dout", "k", "v"), OF_HEADS)
    cases |= dict.fromkeys(("bias", "statistics", "line"), (longer, apart, as_int))
    refused(
        Call(host, "attention_backward_bias", arguments), cases | {"partial": (apart, as_double)}
    )
    with pytest.raises(ValueError, match="there is no bias"):
        host.attention_backward_bias(*(arguments | {"scores": SCORES}).values())


def test_one_buffer_of_q_k_and_v(host):
    qkv, out = torch.randn(2, 20, 3, HEADS, DIM).bfloat16(), heads(2, 20)
    for wrong in (qkv[:, :, :2], qkv[0], qkv[..., 0, :], qkv[..., ::2]):
        with pytest.raises(AssertionError, match="a kernel reads qkv as"):
            host.attention_forward(wrong, PADDED, SCORES, NO_DROPOUT, out, None)
    assert host.attention_forward(qkv, PADDED, SCORES, NO_DROPOUT, out, None)
    other = heads(2, 20)
    parts = attention.Heads(*qkv.unbind(-3))
    assert host.attention_forward(parts, PADDED, SCORES, NO_DROPOUT, other, None)
    assert torch.equal(out, other)


def test_heads_that_are_no_vectors_are_left_alone(host):
    x = torch.randn(2 * 20 * HEADS * DIM + 1).bfloat16()[1:].view(2, 20, HEADS, DIM)
    out = torch.full_like(x.clone(), 7.0)
    assert not host.attention_in_vectors(x) and host.attention_in_vectors(out)
    assert not host.attention_in_vectors(out[..., :12])
    far = torch.empty(2**23 + DIM, dtype=torch.float16)
    assert not host.attention_in_vectors(far.as_strided((2, 1, DIM), (2**23, DIM, 1)))
    assert host.attention_in_vectors(far.as_strided((2, 1, DIM), (2**23 - 8, DIM, 1)))
    odd = attention.Heads(x, x, x)
    assert not host.attention_forward(odd, PADDED, SCORES, NO_DROPOUT, out, None)
    assert bool((out == 7).all())


def test_sizes_beyond_what_kernels_count(host):
    norm = layer_norm.Norm(new(8), new(8), 1e-12)

    def run(x: torch.Tensor) -> None:
        outs = layer_norm.Outputs(torch.empty(1, 8), None, None, None)
        host.layer_norm_forward(x, None, None, norm, NO_DROPOUT, outs)

    for x, text in (
        (new(0, 8), "the number of rows must be between 1 and 2**31 - 1, got 0"),
        (new(1, 8).expand(2**31, 8), "between 1 and 2**31 - 1, got 2147483648"),
        (new(4, 0), "a row must have between 1 and 8192 columns, got 0"),
        (new(1, 8193), "a row must have between 1 and 8192 columns, got 8193"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            run(x)
        if x.shape[1] == 8 or not x.numel():
            with pytest.raises(ValueError, match="must be between 1 and|there must be elements"):
                host.bias_gelu_forward(x, norm.bias, False, torch.empty(1, 8))
    with pytest.raises(ValueError, match="the number of blocks must be between 1 and"):
        grads = layer_norm.Gradients(None, None, *new(3, 8))
        mean = new(1)
        host.layer_norm_backward(
            *(new(1, 8), None, layer_norm.Saved(new(1, 8), mean, mean), norm.weight),
            *(NO_DROPOUT, grads, new(3, 0, 8)),
        )
    with pytest.raises(ValueError, match="the number of chains must be between 1 and"):
        x = new(1, 8)
        host.bias_gelu_backward(x, x, norm.bias, False, x, new(8), new(0, 8))


def test_rows_too_far_apart(host):
    try:
        far = torch.empty(2**31 + 8, dtype=torch.float16)  # nobody touches it
    except RuntimeError:
        pytest.skip("4 GiB of addresses are too many here")
    x = far.as_strided((2, 8), (2**31, 1))
    with pytest.raises(AssertionError, match=re.escape("rows fewer than 2**31 elements apart")):
        host.bias_gelu_forward(x, None, False, torch.empty(2, 8, dtype=torch.float16))


def test_attentions_numbers(host):
    x, bounds = heads(2, 20), torch.tensor([0, 20, 40], dtype=torch.int32)
    tiles = torch.zeros(1, 3, dtype=torch.int32)
    packed = Sequences(None, bounds, 20)
    mask = torch.ones(2, 20, dtype=torch.bool)

    def run(x: torch.Tensor, sequences: Sequences = PADDED, dropout=NO_DROPOUT) -> bool:
        three = attention.Heads(x, x, x)
        return host.attention_forward(three, sequences, SCORES, dropout, x, None)

    flat = x.flatten(0, 1)
    assert run(x) and run(flat, packed) and run(x, Sequences(mask))
    huge = heads(1, 1).expand(2**24, 2**14, HEADS, DIM)
    long = heads(1, 1).expand(1, 2**17 + 1, HEADS, DIM)
    for arguments, text in (
        ((heads(2, 20).repeat(1, 1, 1, 9),), "between 1 and 128, got 144"),
        ((heads(2, 0),), "the longest length must be between 1 and 2**31 - 1, got 0"),
        ((huge,), "batch * heads * length / 64 must stay below 2**31"),
        ((long, Sequences(mask[:1, :1].expand(1, 2**17 + 1))), "2**17 tokens, got 131073"),
        ((flat, packed._replace(max_seqlen=0)), "the longest length must be between 1 and"),
        ((flat, packed._replace(cu_seqlens=bounds[:1])), "the number of sequences must be"),
        ((flat, packed._replace(tiles=tiles, tile=48)), "a tile must be 32 or 64"),
        ((flat, packed._replace(tiles=tiles[:0], tile=32)), "the number of tiles must be"),
        ((flat, packed._replace(key_mask=mask)), "a packed batch has no key_mask"),
        ((x, Sequences(tiles=tiles, tile=32)), "tiles need cu_seqlens"),
        ((x, PADDED, dropout(rows=None)._replace(threshold=65537)), "and 65536, got 65537"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            run(*arguments)
    with pytest.raises(AssertionError, match="a kernel reads q as float16 or bfloat16"):
        run(x.float())


def test_attentions_scores(host):
    x = heads(2, 20)

    def run(scores: tuple) -> bool:
        return host.attention_forward(attention.Heads(x, x, x), PADDED, scores, NO_DROPOUT, x, None)

    assert run(SCORES)
    with pytest.raises(TypeError, match="scores must be a tuple of 6"):
        run((0.25,))
    tables = dict(cos=new(20, DIM // 2), sin=new(20, DIM // 2))
    assert run(SCORES._replace(**tables))
    for name, bad, text in (
        ("cos", new(19, DIM // 2), "a row of half a head's columns for each position"),
        ("cos", new(20, DIM), "a row of half a head's columns for each position"),
        ("cos", new(20), "a row of half a head's columns for each position"),
        ("sin", new(20, DIM // 2 + 1), "160 dense elements of float32"),
        ("sin", new(20, DIM // 2).double(), "160 dense elements of float32"),
        ("sin", new(20 * DIM // 2 + 1)[1:].view(20, DIM // 2), "memory in whole vectors"),
    ):
        with pytest.raises(AssertionError, match=f"a kernel reads {name} as {text}"):
            run(SCORES._replace(**tables | {name: bad}))
    for side in ("left", "right"):
        with pytest.raises(ValueError, match="no less than 0 keys to a side, got -1"):
            run(SCORES._replace(**{side: -1}))
    wrong = new(HEADS, 4), new(HEADS + 1, 3), new(3 * HEADS), new(3, HEADS).t(), new(2, 3).long()
    for bias in wrong:
        with pytest.raises(AssertionError, match="a kernel reads bias as"):
            run(SCORES._replace(bias=bias))


def test_tuples_and_tensors_of_other_kinds(host):
    x = new(ROWS, WIDTH)
    with pytest.raises(TypeError, match="x must be a tensor of torch 2.10 or later, got list"):
        host.bias_gelu_forward([1.0], None, False, x)
    with pytest.raises(TypeError, match="norm must be a tuple of 4"):
        host.layer_norm_forward(x, None, None, (x, x), NO_DROPOUT, (x,) * 5)
    with pytest.raises(TypeError, match="y must be a tensor of torch 2.10 or later, got NoneType"):
        host.bias_gelu_forward(x, None, False, None)


def test_a_torch_without_the_exchange_interface_has_a_reason(monkeypatch):
    from bertfast.ops import native

    monkeypatch.setattr(native, "_DLPACK", "no_such_interface")
    module, reason = native._load.__wrapped__("_host")
    assert module is None and "DLPack's C exchange interface" in reason
