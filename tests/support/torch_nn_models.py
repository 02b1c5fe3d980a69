"""Models, masks and comparisons for tests of converted torch.nn.TransformerEncoders."""

import contextlib
import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from bertfast import convert

WIDTH, HEADS, INNER, ROWS, LENGTH = 16, 2, 24, 3, 7
LENGTHS = torch.tensor([7, 2, 4])
RIGHT = torch.arange(LENGTH) >= LENGTHS[:, None]  # True = padding
INFINITE = torch.zeros(ROWS, LENGTH, dtype=torch.float64).masked_fill(RIGHT, -math.inf)
FINITE = torch.linspace(-2.0, 1.0, ROWS * LENGTH, dtype=torch.float64).view(ROWS, LENGTH)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)


def make(layers=2, norm=True, nested=True, dtype=torch.float64, **options):
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dtype=dtype, **options)
    final = nn.LayerNorm(WIDTH, dtype=dtype) if norm else None
    encoder = nn.TransformerEncoder(layer, layers, norm=final, enable_nested_tensor=nested)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.4)
    return encoder


def converted(encoder, **options):
    """A converted copy."""
    return convert.optimize(copy.deepcopy(encoder), **options)


def inputs(dtype=torch.float64):
    return torch.randn(ROWS, LENGTH, WIDTH, dtype=dtype)


@contextlib.contextmanager
def training_path():
    """torch's modules do in eval what they do in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def assert_near(got, want):
    """A value passes about 20 sums of at most 64 terms, one after the other. Rounding errors within
    a sum add up like a random walk, to sqrt(64) u of its terms' size: 160 u, rounded up. In 16 bits
    a sum is taken in float32 and rounds once: 20 u."""
    assert got.dtype == want.dtype and got.shape == want.shape
    bound = torch.finfo(want.dtype).eps / 2 * (20 if want.dtype.itemsize == 2 else 200)
    scale = want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0.0, atol=bound * max(scale, 1e-30))


def outputs_and_grads(model, x, real=None, **kwargs):
    """The output, zeroed where it is padding, and the gradients of every parameter and of x."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x, **kwargs)
    if real is not None:
        y = torch.where(real, y, 0.0)
    y.backward(torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype, device=y.device).view(y.shape))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": y.detach(), "x": x.grad, **grads}


def assert_same(model, stock, x, real=None, **kwargs):
    """Outputs in eval without gradients, and outputs and gradients with them."""
    with training_path():
        want = outputs_and_grads(stock, x, real, **kwargs)
    got = outputs_and_grads(model, x, real, **kwargs)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_near(got[name], value)
    training = model.training
    with torch.no_grad():
        y = model.eval()(x, **kwargs)
    assert_near(y if real is None else torch.where(real, y, 0.0), want["output"])
    model.train(training)


LAYERS = {
    "post": {},
    "pre": {"norm_first": True},
    "relu": {"activation": "relu"},
    "tanh": {"activation": nn.GELU("tanh")},
    "tanh-partial": {"activation": functools.partial(F.gelu, approximate="tanh")},
    "other": {"activation": lambda x: F.silu(x) * 2.0, "norm_first": True},
    "no-bias": {"bias": False},
    "pre-no-bias": {"bias": False, "norm_first": True, "activation": F.gelu},
    "eps": {"layer_norm_eps": 0.3},
    "length-first": {"batch_first": False},
    "pre-length-first": {"batch_first": False, "norm_first": True},
}
PADDINGS = {
    "none": None,
    "right": RIGHT,
    "left": RIGHT.flip(1),
    "holes": torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 3 == 1,
    "all-of-a-row": RIGHT | (torch.arange(ROWS) == 1)[:, None],
    "infinite": INFINITE,
    "finite": FINITE,
}
