"""Memory of a layer's nodes, kept and at its most, and the number of kernels that they launch."""

import pytest
import torch
from support.launches import kernels
from support.layers import gradients, make, make_input

from bertfast.nn import Encoder, EncoderLayer


def saved_units(module, x, batch=None):
    """Bytes that the graph keeps, besides parameters, in units of x's size."""
    module(x, batch)  # q, k and v find their place
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(x, batch)
    assert y.requires_grad
    return sum(kept.values()) / x.nbytes


@pytest.mark.parametrize("recompute, units", [(False, 15), (True, 11)])
def test_what_is_saved(compiled, recompute, units):
    """In tokens x width x element: x 1, qkv 3, context 1, z 1, u 4, h 4 unless it is made again, z
    1; and of each token some float32 statistics, which are small."""
    module = EncoderLayer(128, 2, 512, dropout=0.0, attention_dropout=0.0, backend=compiled[0])
    module = module.to(compiled[1], torch.bfloat16)
    module.recompute = recompute
    x = torch.randn(1, 48, 128, device=compiled[1]).to(torch.bfloat16).requires_grad_()
    statistics = 48 * 4 * (2 + 2 + 2) / x.nbytes  # lse of two heads, two means, two rstds
    assert saved_units(module, x) == pytest.approx(units + statistics, abs=0.01)


def test_concatenated_weights_are_never_saved(compiled, monkeypatch):
    """If q, k and v may not be moved (sharding) they are joined for a product, and again in the
    backward."""
    from bertfast.nn.joined import JoinedWeights

    module, x = make(compiled), make_input(compiled)
    expected, units = gradients(module, x), saved_units(module, x)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    monkeypatch.setattr(JoinedWeights, "_may_move", lambda *_: False)
    module._joined = JoinedWeights()
    assert saved_units(module, x) == units
    for a, b in zip(gradients(module, x), expected, strict=True):
        assert torch.equal(a, b)


ROWS, LENGTH, WIDTH = 64, 64, 32
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


def large(recompute=False, dropout=0.0, rows=ROWS):
    """Many tokens and a small width, so that parameters' gradients are small beside activations."""
    layer = EncoderLayer(
        *(WIDTH, 1, 4 * WIDTH),
        **dict(dropout=dropout, attention_dropout=dropout, backend="cuda", recompute=recompute),
    ).to(torch.bfloat16)
    x = torch.randn(rows, LENGTH, WIDTH).to(torch.bfloat16).requires_grad_()
    layer(x)  # q, k and v find their place
    return layer, x


def peak_units(function, unit):
    """The most memory that a function has allocated at a time, on a CPU, but for what torch's
    products there take while they run."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    now = most = product_ends = 0
    for event in events:
        if event.name() in PRODUCTS:
            product_ends = max(product_ends, event.start_ns() + event.duration_ns())
        elif event.name() == "[memory]":
            now += event.nbytes()
            if event.start_ns() > product_ends:
                most = max(most, now)
    return most / unit


@pytest.mark.host
@pytest.mark.parametrize("recompute, most", [(False, 21), (True, 18)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_peak(host_runtime, recompute, most, dropout):
    """Of forward and backward, with x and the gradient that comes in."""
    host_runtime.set_dry_launch(True)
    layer, x = large(recompute, dropout, rows=1024)

    def step():
        y = layer(x)
        y.backward(torch.ones_like(y))

    def parameters_gradients():
        return sum(p.numel() for p in layer.parameters()) * 2 / x.nbytes

    # The most partial sums of a backward are bias_gelu's: as many rows as fill a GPU, 3.3 MB at
    # most, however many tokens there are.
    u = x.detach().new_empty(x.numel() // WIDTH, 4 * WIDTH)
    rows, columns = host_runtime.bias_gelu_partial_shape(u)
    partial = 4 * rows * columns
    assert partial < 3.4e6
    units = 1 + peak_units(step, x.nbytes)
    bound = most + parameters_gradients() + partial / x.nbytes
    assert units <= bound + 0.5  # and lse, means and rstds


@pytest.mark.host
def test_casts_under_autocast(host_runtime):
    """One of each weight that a product has, one of each bias that is added to 16 bits, and one of
    the first layer's input: the next layers read what LayerNorm wrote for them."""
    host_runtime.set_dry_launch(True)
    torch.manual_seed(0)
    encoder = Encoder(3, WIDTH, 1, 4 * WIDTH, dropout=0.0, attention_dropout=0.0, backend="cuda")
    x = torch.randn(4, 16, WIDTH, requires_grad=True)
    dy = torch.randn(4, 16, WIDTH)

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return encoder(x)

    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            y = forward()  # q, k and v find their place
            names = kernels(forward, host_runtime)[1]
        assert names.count("aten::copy_") == 1 + 3 * (4 + 2)
    # In the backward: each of those parameters' gradients, and x's.
    _, names = kernels(lambda: torch.autograd.grad(y, [x, *encoder.parameters()], dy), host_runtime)
    assert names.count("aten::copy_") <= 3 * (4 + 2)


@pytest.mark.host
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kernels(host_runtime, dropout):
    host_runtime.set_dry_launch(True)
    layer, x = large(dropout=dropout)
    layer.eval()
    with torch.no_grad():
        assert kernels(lambda: layer(x), host_runtime)[0] == 8
    layer.train()
    found = {}
    assert kernels(lambda: found.update(y=layer(x)), host_runtime)[0] == 8 + bool(dropout)
    y = found["y"]
    dy = torch.ones_like(y)
    leaves = [x, *layer.parameters()]
    count, names = kernels(lambda: torch.autograd.grad(y, leaves, dy), host_runtime)
    assert count == 18, names  # one of them makes the input of the MLP block again
