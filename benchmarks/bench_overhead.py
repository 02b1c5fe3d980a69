"""What a call costs on the host, in Python and torch: no kernel runs.

    pytest benchmarks/bench_overhead.py --benchmark-json=FILE

The CUDA path is taken with the kernels compiled for the host and their launch switched off, so the
same Python, checks, allocations and binding run as on a GPU, but for the launch itself. The tensors
are tiny, there is one thread, and what stock torch calls for the same, which does run, stands
beside it. An op without CUDA kernels here is skipped with the reason. Baselines lie in
benchmarks/results.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bertfast import nn as encoder
from bertfast import ops

_host = pytest.importorskip("bertfast._host")
BACKEND = "cuda"
WIDTH, HEADS, INNER = 768, 12, 3072
DTYPE = torch.bfloat16  # where attention is: in CUDA it takes 16 bits


@pytest.fixture(autouse=True)
def dry():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _host.set_dry_launch(True)
    yield
    _host.set_dry_launch(False)
    torch.set_num_threads(threads)


class LayerNorm:
    """A kernel against what it stands for: two additions, then layer_norm."""

    needs = ("layer_norm",)

    def tensors(self):
        return [*torch.randn(2, 8, WIDTH), *torch.randn(3, WIDTH)]

    def fused(self, x, residual, weight, bias, x_bias, **more):
        return ops.layer_norm(
            x, weight, bias, residual=residual, x_bias=x_bias, backend=BACKEND, **more
        )

    def stock(self, x, residual, weight, bias, x_bias):
        return F.layer_norm((x + x_bias) + residual, (WIDTH,), weight, bias, 1e-12)


class PlainLayerNorm(LayerNorm):
    """Nothing added, so that stock torch too is one call."""

    def tensors(self):
        return [torch.randn(8, WIDTH), *torch.randn(2, WIDTH)]

    def fused(self, x, weight, bias):
        return ops.layer_norm(x, weight, bias, backend=BACKEND)

    def stock(self, x, weight, bias):
        return F.layer_norm(x, (WIDTH,), weight, bias, 1e-12)


class LayerNormDropout(LayerNorm):
    def __init__(self):
        self.seed = torch.zeros(1, dtype=torch.int64)

    def fused(self, *tensors):
        return super().fused(*tensors, dropout_p=0.1, seed=self.seed)

    def stock(self, x, residual, weight, bias, x_bias):
        z = F.dropout(x + x_bias, 0.1) + residual
        return F.layer_norm(z, (WIDTH,), weight, bias, 1e-12)


class BiasGelu:
    needs = ("bias_gelu",)

    def tensors(self):
        return [torch.randn(8, INNER), torch.randn(INNER)]

    def fused(self, x, bias):
        return ops.bias_gelu(x, bias, backend=BACKEND)

    def stock(self, x, bias):
        return F.gelu(x + bias)


class Attention:
    needs = ("attention",)

    def tensors(self):
        return list(torch.randn(3, 1, 8, HEADS, 64, dtype=DTYPE))

    def fused(self, q, k, v):
        return ops.attention(q, k, v, backend=BACKEND)

    def stock(self, q, k, v):
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class AttentionQKV:
    """Packed: two sequences of four tokens."""

    needs = ("attention_qkv",)

    def __init__(self):
        self.layout = {"cu_seqlens": torch.tensor([0, 4, 8], dtype=torch.int32), "max_seqlen": 4}

    def tensors(self):
        return [torch.randn(8, 3, HEADS, 64, dtype=DTYPE)]

    def fused(self, qkv):
        return ops.attention_qkv(qkv, **self.layout, backend=BACKEND)

    def stock(self, qkv):
        q, k, v = qkv.view(2, 4, 3, HEADS, 64).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class EncoderLayer:
    """A whole layer, narrow, so that its products, which do run, take little."""

    needs = ("layer_norm", "bias_gelu", "attention_qkv")

    def __init__(self):
        self.ours = encoder.EncoderLayer(64, 2, 64, backend=BACKEND).to(DTYPE).eval()
        self.theirs = nn.TransformerEncoderLayer(
            64, 2, 64, 0.0, "gelu", batch_first=True, dtype=DTYPE
        )

    def tensors(self):
        return [torch.randn(1, 8, 64, dtype=DTYPE)]

    def fused(self, x):
        return self.ours(x)

    def stock(self, x):
        return self.theirs(x)


CASES = (
    LayerNorm,
    PlainLayerNorm,
    LayerNormDropout,
    BiasGelu,
    Attention,
    AttentionQKV,
    EncoderLayer,
)


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
def case(request):
    for op in request.param.needs:
        reason = ops.available("cpu")[op][BACKEND]
        if reason is not None:
            pytest.skip(reason)
    return request.param()


def run(benchmark, call):
    benchmark.pedantic(call, rounds=1000, iterations=20, warmup_rounds=20)


@pytest.mark.parametrize("who", ["fused", "stock"])
def test_gradients_off(benchmark, case, who):
    call, tensors = getattr(case, who), case.tensors()
    with torch.no_grad():
        run(benchmark, lambda: call(*tensors))


@pytest.mark.parametrize("who", ["fused", "stock"])
def test_gradients_on(benchmark, case, who):
    call, tensors = getattr(case, who), [tensor.requires_grad_() for tensor in case.tensors()]
    run(benchmark, lambda: call(*tensors))


@pytest.mark.parametrize("who", ["fused", "stock"])
def test_backward(benchmark, case, who):
    call, tensors = getattr(case, who), [tensor.requires_grad_() for tensor in case.tensors()]
    y = call(*tensors)
    dy = torch.randn_like(y)
    run(benchmark, lambda: torch.autograd.grad(y, tensors, dy, retain_graph=True))
