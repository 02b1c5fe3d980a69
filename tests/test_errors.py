"""Every bad input has an error that names the argument, what was expected and what came."""

import re

import pytest
import torch

from bertfast.ops import available, bias_gelu, dropout_keep_mask, gated, layer_norm

X, W, B = torch.randn(2, 3, 8), torch.ones(8), torch.zeros(8)
SEED = torch.tensor([1])
NESTED = torch.nested.nested_tensor([X[0], X[1, :2]])
JAGGED = torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged)

BAD = [
    (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    (
        dict(x=X.long()),
        TypeError,
        "x must have dtype float64, float32, float16 or bfloat16, got torch.int64",
    ),
    (dict(x=torch.tensor(1.0)), ValueError, "x must have a last dimension of 1 or more, got []"),
    (dict(x=X[..., :0]), ValueError, "x must have a last dimension of 1 or more, got [2, 3, 0]"),
    (dict(weight=torch.ones(4)), ValueError, "weight must have shape [8], got [4]"),
    (dict(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    (dict(return_sum=1), TypeError, "return_sum must be a bool, got int"),
    (dict(bias=[0.0] * 8), TypeError, "bias must be a tensor, got list"),
    (dict(bias=torch.ones(1, 8)), ValueError, "bias must have shape [8], got [1, 8]"),
    (dict(bias=B.half()), TypeError, "bias must have dtype torch.float32 (x's), got torch.float16"),
    (dict(x_bias=B[:7]), ValueError, "x_bias must have shape [8], got [7]"),
    (dict(residual=X[0]), ValueError, "residual must have shape [2, 3, 8], got [3, 8]"),
    (
        dict(residual=X.double()),
        TypeError,
        "residual must have dtype torch.float32 (x's), got torch.float64",
    ),
    (dict(residual=X.to("meta")), ValueError, "residual must be on cpu (where x is), got meta"),
    (dict(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1, got 1.5"),
    (dict(dropout_p=float("nan")), ValueError, "dropout_p must be between 0 and 1, got nan"),
    (dict(dropout_p="0.1"), TypeError, "dropout_p must be a number, got str"),
    (dict(site=-1), ValueError, "site must be between 0 and 2**31 - 1, got -1"),
    (dict(site=1.0), TypeError, "site must be an int, got float"),
    (dict(seed=7), TypeError, "seed must be an int64 tensor with one element"),
    (
        dict(seed=torch.tensor([1.0])),
        ValueError,
        "seed must be an int64 tensor with one element, got torch.float32 with shape [1]",
    ),
    (
        dict(seed=torch.tensor([1, 2])),
        ValueError,
        "seed must be an int64 tensor with one element, got torch.int64 with shape [2]",
    ),
    (dict(seed=SEED.to("meta")), ValueError, "seed must be on cpu (where x is), got meta"),
    (dict(row_index=[0]), TypeError, "row_index must be an int64 tensor, got list"),
    (
        dict(row_index=torch.arange(6).int()),
        TypeError,
        "row_index must have dtype torch.int64, got torch.int32",
    ),
    (
        dict(row_index=torch.arange(5)),
        ValueError,
        "row_index must have shape [6] (one number for each row of x), got [5]",
    ),
    (
        dict(backend="cudnn"),
        ValueError,
        "backend must be one of 'auto', 'torch', 'triton', 'cuda', got 'cudnn'",
    ),
    (dict(backend=["torch"]), ValueError, "backend must be one of 'auto', 'torch', 'triton', 'cu"),
    (dict(eps="1e-5"), TypeError, "eps must be a number, got str"),
    (dict(eps=None), TypeError, "eps must be a number, got NoneType"),
    (dict(eps=True), TypeError, "eps must be a number, got bool"),
    (dict(eps=-1e-5), ValueError, "eps must be 0 or more and finite in float32, got -1e-05"),
    (dict(eps=float("nan")), ValueError, "eps must be 0 or more and finite in float32, got nan"),
    (dict(eps=float("inf")), ValueError, "eps must be 0 or more and finite in float32, got inf"),
    (dict(eps=10**400), ValueError, "eps must be 0 or more and finite in float32, got an int of 1"),
    (dict(dropout_p=True), TypeError, "dropout_p must be a number, got bool"),
    (dict(site=True), TypeError, "site must be an int, got bool"),
    (dict(x=X.to_sparse()), TypeError, "x must be a dense tensor, got one of layout torch.sparse_"),
    (dict(x=X.to_mkldnn()), TypeError, "x must be a dense tensor, got one of layout torch._mkldnn"),
    (dict(x=NESTED), TypeError, "x must be a dense tensor, got a nested one"),
    (dict(x=JAGGED), TypeError, "x must be a dense tensor, got a nested one"),
    (dict(x=X.to(torch.float8_e5m2)), TypeError, "x must have dtype float64, float32, float16 or "),
    (dict(residual=X.to_sparse()), TypeError, "residual must be a dense tensor, got one of layout"),
    (dict(residual=NESTED), TypeError, "residual must be a dense tensor, got a nested one"),
    (dict(weight=W.to_sparse()), TypeError, "weight must be a dense tensor, got one of layout tor"),
    (dict(seed=SEED.to_sparse()), TypeError, "seed must be a dense tensor, got one of layout torc"),
    (
        dict(row_index=torch.arange(6).to_sparse()),
        TypeError,
        "row_index must be a dense tensor, got one of layout torch.sparse_coo",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=lambda value: str(value)[:40])
def test_error_text(change, error, text):
    arguments = dict(x=X, weight=W, bias=B) | change
    with pytest.raises(error, match=re.escape(text)):
        layer_norm(**arguments)


BAD_GELU = [
    (dict(x=None), TypeError, "x must be a tensor, got NoneType"),
    (
        dict(x=X.int()),
        TypeError,
        "x must have dtype float64, float32, float16 or bfloat16, got torch.int32",
    ),
    (
        dict(x=torch.tensor(1.0)),
        ValueError,
        "x must have a last dimension (the bias's), got []",
    ),
    (dict(bias=1.0), TypeError, "bias must be a tensor, got float"),
    (dict(bias=B[:7]), ValueError, "bias must have shape [8], got [7]"),
    (dict(bias=B.half()), TypeError, "bias must have dtype torch.float32 (x's), got torch.float16"),
    (dict(bias=B.to("meta")), ValueError, "bias must be on cpu (where x is), got meta"),
    (
        dict(approximate="erf"),
        ValueError,
        "approximate must be one of 'none', 'tanh', got 'erf'",
    ),
    (dict(approximate=None), ValueError, "approximate must be one of 'none', 'tanh', got None"),
    (dict(approximate=["tanh"]), ValueError, "approximate must be one of 'none', 'tanh', got list"),
    (dict(x=X.to_sparse()), TypeError, "x must be a dense tensor, got one of layout torch.sparse_"),
    (dict(x=NESTED), TypeError, "x must be a dense tensor, got a nested one"),
    (dict(bias=B.to_sparse()), TypeError, "bias must be a dense tensor, got one of layout torch.s"),
    (
        dict(backend="cudnn"),
        ValueError,
        "backend must be one of 'auto', 'torch', 'triton', 'cuda', got 'cudnn'",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD_GELU, ids=lambda value: str(value)[:40])
def test_bias_gelu_error_text(change, error, text):
    arguments = dict(x=X, bias=B) | change
    with pytest.raises(error, match=re.escape(text)):
        bias_gelu(**arguments)


BAD_GATED = [
    (dict(x=None), TypeError, "x must be a tensor, got NoneType"),
    (
        dict(x=X.int()),
        TypeError,
        "x must have dtype float64, float32, float16 or bfloat16, got tor",
    ),
    (
        dict(x=X[..., :7]),
        ValueError,
        "x must have a last dimension of an even size, for two halves, got shape [2, 3, 7]",
    ),
    (dict(x=X[0, 0, 0]), ValueError, "of an even size, for two halves, got shape []"),
    (dict(bias=B[:4]), ValueError, "bias must have shape [8], got [4]"),
    (dict(bias=B.half()), TypeError, "bias must have dtype torch.float32 (x's), got torch.float16"),
    (dict(bias=B.to("meta")), ValueError, "bias must be on cpu (where x is), got meta"),
    (
        dict(activation="relu"),
        ValueError,
        "activation must be one of 'gelu', 'gelu_tanh', 'silu', got 'relu'",
    ),
    (dict(activated=1), ValueError, "activated must be one of 'first', 'second', got 1"),
    (
        dict(backend="cudnn"),
        ValueError,
        "backend must be one of 'auto', 'torch', 'triton', 'cuda', got 'cudnn'",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD_GATED, ids=lambda value: str(value)[:40])
def test_gated_error_text(change, error, text):
    arguments = dict(x=X, bias=B) | change
    with pytest.raises(error, match=re.escape(text)):
        gated(**arguments)


def test_explicit_backend_of_gated_never_falls_back(target, need):
    need("gated", target)
    double = torch.randn(2, 8, dtype=torch.float64, device=target[1])
    text = "can't run gated here: x must be float32, float16 or bfloat16, got torch.float64"
    with pytest.raises(ValueError, match=text):
        gated(double, backend=target[0])
    assert gated(double).dtype == torch.float64


def test_explicit_backend_of_bias_gelu_never_falls_back(target, need):
    need("bias_gelu", target)
    backend, device = target
    double = torch.randn(2, 8, dtype=torch.float64, device=device)
    text = "x must be float32, float16 or bfloat16, got torch.float64"
    with pytest.raises(ValueError, match=text):
        bias_gelu(double, backend=backend)
    assert bias_gelu(double).dtype == torch.float64


def test_explicit_backend_never_falls_back(target, need):
    need("layer_norm", target)
    backend, device = target
    wide = torch.randn(2, 8193, device=device)
    weight = torch.ones(8193, device=device)
    with pytest.raises(ValueError, match="the width must be between 1 and 8192, got 8193"):
        layer_norm(wide, weight, weight, backend=backend)
    double = torch.randn(2, 8, dtype=torch.float64, device=device)
    ones = torch.ones(8, dtype=torch.float64, device=device)
    text = "x must be float32, float16 or bfloat16, got torch.float64"
    with pytest.raises(ValueError, match=text):
        layer_norm(double, ones, ones, backend=backend)
    # auto finds another.
    assert layer_norm(wide, weight, weight).shape == wide.shape
    assert layer_norm(double, ones, ones).dtype == torch.float64


def test_the_error_is_what_available_says():
    for backend, reason in available("meta")["layer_norm"].items():
        if reason is None:
            assert backend == "torch"
            continue
        x, weight = X.to("meta"), W.to("meta")
        with pytest.raises(ValueError, match=re.escape(reason)):
            layer_norm(x, weight, weight, backend=backend)


def test_dropout_keep_mask_errors():
    for arguments, error, text in [
        ((SEED, 0, (2, 8), 0.1, "rows"), ValueError, "kind must be one of 'row', 'attention'"),
        ((SEED, 0, (2, 8), 0.1, "attention"), ValueError, "(batch, heads, queries, keys)"),
        ((SEED, 0, (), 0.1, "row"), ValueError, "at least one dimension"),
        ((SEED, 0, (2, 8), -0.1, "row"), ValueError, "p must be between 0 and 1, got -0.1"),
        ((SEED, 0, (2, 8), True, "row"), TypeError, "p must be a number, got bool"),
        ((SEED, 0, (2, 8), 0.1, ["row"]), ValueError, "kind must be one of 'row', 'attention', go"),
        ((SEED, 1.0, (2, 8), 0.1, "row"), TypeError, "site must be an int, got float"),
        ((SEED, 0, (2, -8), 0.1, "row"), ValueError, "shape must have ints of 0 or more, got -8"),
        ((SEED, 0, (2, 8.0), 0.1, "row"), TypeError, "shape must be a tuple or list of ints, got "),
        ((SEED, 0, (2, True), 0.1, "row"), TypeError, "shape must be a tuple or list of ints, got"),
        ((SEED, 0, 8, 0.1, "row"), TypeError, "shape must be a tuple or list of ints, got int"),
        ((SEED, 0, None, 0.1, "row"), TypeError, "shape must be a tuple or list of ints, got None"),
        ((SEED, 0, (1, 1, 2, -1), 0.1, "attention"), ValueError, "shape must have ints of 0 or mo"),
        ((3, 0, (2, 8), 0.1, "row"), TypeError, "seed must be an int64 tensor"),
    ]:
        with pytest.raises(error, match=re.escape(text)):
            dropout_keep_mask(*arguments)


@pytest.mark.parametrize("device", ["nonsense", None, 1.5, ["cpu"]], ids=str)
def test_available_names_a_bad_device(device):
    text = "device must be a torch.device or the name of one, got "
    with pytest.raises(ValueError, match=re.escape(text)):
        available(device)
