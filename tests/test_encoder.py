"""bertfast.nn.Encoder holds a Hugging Face encoder's weights and computes the same."""

import copy
import pickle

import pytest
import torch

from bertfast.nn import Encoder
from bertfast.testing.hf import batch, tiny
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


def test_bad_arguments():
    with pytest.raises(ValueError, match="width must be a multiple of heads"):
        Encoder(1, 10, 3, 8)
    encoder, x = Encoder(1, 8, 2, 8), torch.randn(2, 5, 8)
    for mask in (torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask must be bool with shape"):
            encoder(x, mask)


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
