"""bertfast.nn.Encoder holds a Hugging Face encoder's weights and computes the same."""

import copy
import pickle
import re

import pytest
import torch
from support.hf_models import batch, tiny

from bertfast.nn import Encoder
from bertfast.testing.model import HIDDEN_ATOL

transformers = pytest.importorskip("transformers")


@pytest.fixture
def pair():
    stock = tiny()
    own = Encoder(2, 64, 4, 96).eval()
    own.load_state_dict(stock.encoder.state_dict(), strict=True)
    inputs = batch()
    with torch.no_grad():
        x = stock.embeddings(inputs["input_ids"])
        mask = inputs["attention_mask"].bool()
        expected = stock(**inputs)[0]
    return own, x, mask, expected


@pytest.mark.parametrize("packed", [True, False])
def test_same_keys_and_numbers(pair, packed):
    own, x, mask, expected = pair
    own.packed = packed
    out = own(x, mask)
    torch.testing.assert_close(out[mask], expected[mask], rtol=0, atol=HIDDEN_ATOL)
    assert out.isfinite().all()
    assert torch.equal(out[~mask], out[:, :1].expand_as(out)[~mask]) == packed
    again = pickle.loads(pickle.dumps(copy.deepcopy(own)))
    assert torch.equal(again(x, mask), out)


BAD = [
    (dict(layers=-1), ValueError, "layers must be 1 or more, got -1"),
    (dict(layers=2.0), TypeError, "layers must be an int, got float"),
    (dict(width=10, heads=3), ValueError, "width must be a multiple of heads (3), got 10"),
    (dict(width=0), ValueError, "width must be 1 or more, got 0"),
    (dict(heads=-2), ValueError, "heads must be 1 or more, got -2"),
    (dict(heads=0), ValueError, "heads must be 1 or more, got 0"),
    (dict(heads=True), TypeError, "heads must be an int, got bool"),
    (dict(inner=0), ValueError, "inner must be 1 or more, got 0"),
    (dict(dropout=2), ValueError, "dropout must be between 0 and 1, got 2"),
    (dict(attention_dropout=-0.1), ValueError, "attention_dropout must be between 0 and 1, got -"),
    (dict(eps=-1e-5), ValueError, "eps must be 0 or more and finite in float32, got -1e-05"),
    (dict(eps="1e-5"), TypeError, "eps must be a number, got str"),
    (dict(approximate="erf"), ValueError, "approximate must be one of 'none', 'tanh', got 'erf'"),
    (dict(backend="cudnn"), ValueError, "backend must be one of 'auto', 'torch', 'triton', 'cuda'"),
    (dict(packed="sometimes"), TypeError, "packed must be a bool, got str"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=str)
def test_bad_arguments(change, error, text):
    with pytest.raises(error, match=re.escape(text)):
        Encoder(**dict(layers=1, width=8, heads=2, inner=8) | change)


X, MASK = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
BAD_CALLS = [
    ((None,), TypeError, "x must be a tensor, got NoneType"),
    ((X.long(),), TypeError, "x must have dtype float64, float32, float16 or bfloat16, got torch"),
    ((X[0],), ValueError, "x must have shape [rows, length, 8], got [5, 8]"),
    ((X[..., :6],), ValueError, "x must have shape [rows, length, 8], got [2, 5, 6]"),
    ((X, [True]), TypeError, "mask must be a bool tensor, got list"),
    ((X, MASK.float()), TypeError, "mask must have dtype torch.bool (True = attend), got torch.fl"),
    ((X, MASK[:, :4]), ValueError, "mask must have shape [2, 5], got [2, 4]"),
    ((X, MASK[:, None]), ValueError, "mask must have shape [2, 5], got [2, 1, 5]"),
    ((X, MASK.to("meta")), ValueError, "mask must be on cpu (where x is), got meta"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD_CALLS, ids=lambda v: str(v)[:30])
def test_bad_calls(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        Encoder(1, 8, 2, 8)(*arguments)


def test_a_layer_checks_what_it_is_given():
    layer = Encoder(1, 8, 2, 8).layer[0]
    with pytest.raises(ValueError, match=re.escape("x must have shape [rows, length, 8], got [5")):
        layer(X[0])
    with pytest.raises(TypeError, match="batch must be a bertfast.packing.batch.Batch, got Tensor"):
        layer(X, MASK)


@pytest.mark.triton
def test_its_weights_are_joined_and_stay_its_own():
    from bertfast.ops import available

    reason = available("cpu")["attention_qkv"]["triton"]
    if reason is not None:
        pytest.skip(reason)
    own = Encoder(1, 16, 2, 16, backend="triton", dropout=0.0, attention_dropout=0.0)
    x, mask = torch.randn(2, 4, 16), torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    plain = copy.deepcopy(own)
    plain.backend = "auto"
    plain.layer[0].backend = "auto"
    for _ in range(2):
        grads = []
        for one in (own, plain):
            one.zero_grad()
            one(x, mask).pow(2).tanh().sum().backward()
            grads.append([p.grad for p in one.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=HIDDEN_ATOL)
        for one in (own, plain):
            torch.optim.SGD(one.parameters(), lr=0.1).step()
    weights = [
        own.layer[0].attention.self.get_submodule(n).weight for n in ("query", "key", "value")
    ]
    assert weights[1].data_ptr() - weights[0].data_ptr() == weights[0].nbytes
