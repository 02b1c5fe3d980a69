"""torch.set_default_device changes nothing: what bertfast makes, it makes where the inputs are.

The default is "meta" here, on which nothing has values: a tensor that was made without a device
would lack its own.
"""

import copy

import pytest
import torch
from support.hf_models import batch, packs, tiny
from torch import nn

import bertfast
from bertfast import packing
from bertfast.ops import attention, bias_gelu, layer_norm


@pytest.fixture(params=["set_default_device", "context"])
def elsewhere(request):
    """Switches the default device to "meta", in either way."""
    if request.param == "context":
        with torch.device("meta"):
            yield
    else:
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)


@pytest.fixture
def inputs():
    """Made before the switch."""
    return batch()


@pytest.fixture
def models():
    pytest.importorskip("transformers")
    stock = tiny(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    return {mode: bertfast.optimize(copy.deepcopy(stock).train(mode)) for mode in (True, False)}


@pytest.fixture
def expected(models, inputs):
    """Output and gradients of each mode, before the switch."""
    return {mode: results(model, inputs) for mode, model in models.items()}


def results(model, inputs):
    torch.manual_seed(5)
    model.zero_grad()
    hidden = model(**inputs)[0]
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("training", [True, False])
def test_a_model(training, models, inputs, expected, elsewhere):
    found = results(models[training], inputs)
    assert all(map(torch.equal, found, expected[training]))
    assert packs(models[training], inputs)
    assert bertfast.report(models[training]).notes == []


@pytest.fixture
def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.fixture
def data(encoder):
    x, padding = torch.randn(3, 7, 16), torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    y = encoder(x, src_key_padding_mask=padding)
    nested = torch.nested.nested_tensor([x[0, :4], x[1]])
    return x, padding, y, nested


def test_an_encoder_of_torch(encoder, data, elsewhere):
    x, padding, expected, nested = data
    bertfast.optimize(encoder)
    y = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[~padding], expected[~padding], rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder(nested)[0], expected[0, :4], rtol=0, atol=1e-5)


@pytest.fixture
def qkv():
    return torch.randn(3, 40, 2, 16, dtype=torch.float16)


@pytest.fixture
def bounds():
    return torch.tensor([0, 5, 40], dtype=torch.int32)


def test_the_ops(qkv, bounds, target, need, elsewhere):
    backend, device = target
    for op in ("attention", "layer_norm", "bias_gelu"):
        need(op, target, torch.float16)
    q, k, v = (part.to(device).requires_grad_() for part in qkv)
    cu_seqlens = bounds.to(device)
    plan = packing.plan(cu_seqlens, 35, 40)
    out = attention(
        *(q, k, v), cu_seqlens=cu_seqlens, max_seqlen=35, plan=plan, dropout_p=0.1, backend=backend
    )
    rows = out.flatten(1)
    weight = qkv[0, 0].flatten().to(device)
    y = layer_norm(rows, weight, weight, dropout_p=0.1, residual=rows, backend=backend)
    y = bias_gelu(y, weight, backend=backend)
    y.sum().backward()
    assert y.device.type == device and q.grad.isfinite().all()
    assert (
        bertfast.ops.dropout_keep_mask(
            torch.zeros(1, dtype=torch.int64, device=device), 0, (2, 2, 5, 5), 0.5, "attention"
        ).device.type
        == device
    )
