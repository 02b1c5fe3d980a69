"""A CPU's fused products: right in every derivative, the same bits whoever asks for them."""

import concurrent.futures
import contextlib
import hashlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bertfast
from bertfast.ops.linear import onednn as cpu_linear
from bertfast.testing.budget import UNIT_ROUNDOFF

FORMS = ("linear", "none", "tanh", "add")


@pytest.fixture
def onednn(monkeypatch):
    """The fused products are used, whatever the CPU."""
    monkeypatch.setenv(cpu_linear.VARIABLE, "1")
    cpu_linear.forget()
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    yield
    cpu_linear.forget()


@pytest.mark.parametrize("value, used", [("0", False), ("1", True)])
def test_the_setting_decides(monkeypatch, onednn, value, used):
    monkeypatch.setenv(cpu_linear.VARIABLE, value)
    cpu_linear.forget()
    assert cpu_linear.serves(torch.ones(2, 3), torch.ones(4, 3), training=False) == used
    assert not cpu_linear.serves(torch.ones(2, 3), torch.ones(4, 3), training=True)


def test_a_bad_setting_raises(monkeypatch, onednn):
    monkeypatch.setenv(cpu_linear.VARIABLE, "yes")
    cpu_linear.forget()
    with pytest.raises(ValueError, match="BERTFAST_ONEDNN must be 0, 1 or unset, got 'yes'"):
        cpu_linear.serves(torch.ones(2, 3), torch.ones(4, 3), training=False)


@pytest.fixture
def unset(monkeypatch, onednn):
    """Without a setting, on a processor with AVX-512, unless another one is named."""

    def be(capability="AVX512", intel=False):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(cpu_linear, "_is_intel", lambda: intel)
        cpu_linear.forget()

    monkeypatch.delenv(cpu_linear.VARIABLE)
    be()
    return be


def test_without_a_setting_the_instruction_set_decides(unset):
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        unset(capability)
        x, weight = torch.ones(128, 256), torch.ones(256, 256)
        assert cpu_linear.serves(x, weight, training=False) == (capability == "AVX512")


@pytest.mark.parametrize(
    "rows, width, used", [(7, 768, False), (8, 768, True), (127, 384, False), (128, 384, True)]
)
def test_without_a_setting_few_rows_are_torch_s(unset, rows, width, used):
    x, weight = torch.ones(1, rows, 768), torch.ones(width, 768)
    assert cpu_linear.serves(x, weight, training=False) == used


@pytest.mark.parametrize(
    "rows, approximate, used",
    [(256, "none", True), (255, "none", False), (1024, None, True), (1023, None, False)],
)
def test_without_a_setting_little_work_is_torch_s(unset, rows, approximate, used):
    """Of a GELU's product less will do."""
    x = torch.ones(rows, 64)
    weight = torch.ones(128, 64)
    assert cpu_linear.serves(x, weight, False, approximate) == used


@pytest.mark.parametrize(
    "rows, approximate, used",
    [(1024, "none", True), (1023, "tanh", False), (2**14, None, False)],
)
def test_on_intel_s_only_a_gelu_is_worth_it(unset, rows, approximate, used):
    unset(intel=True)
    x, weight = torch.ones(rows, 64), torch.ones(128, 64)
    assert cpu_linear.serves(x, weight, False, approximate) == used
    wide = torch.ones(768, 768)
    assert cpu_linear.serves(torch.ones(8, 768), wide, False, approximate) == bool(approximate)


def stock(form, x, weight, bias, residual):
    z = F.linear(x, weight, bias)
    if form == "add":
        return z + residual
    return z if form == "linear" else F.gelu(z, approximate=form)


def fused(form, x, weight, bias, residual):
    if form == "add":
        return cpu_linear.linear_add(x, residual, weight, bias)
    if form == "linear":
        return cpu_linear.linear(x, weight, bias)
    return cpu_linear.linear_gelu(x, weight, bias, form)


def derivatives(function, form, tensors, has_bias):
    """The result, its gradients, and the gradients of their squares' sum."""
    x, weight, bias, residual = (tensor.clone().requires_grad_() for tensor in tensors)
    leaves = [x, weight, *([bias] if has_bias else []), *([residual] if form == "add" else [])]
    y = function(form, x, weight, bias if has_bias else None, residual)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [y, *first, *second]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_first_and_second_derivatives(onednn, form, has_bias):
    shapes = ((2, 33, 64), (96, 64), (96,), (2, 33, 96))
    tensors = [torch.randn(shape) / math.sqrt(shape[-1]) for shape in shapes]
    exact = derivatives(stock, form, [tensor.double() for tensor in tensors], has_bias)
    ours, theirs = (derivatives(f, form, tensors, has_bias) for f in (fused, stock))
    u = UNIT_ROUNDOFF[torch.float32]
    for mine, other, reference in zip(ours, theirs, exact, strict=True):
        scale = reference.abs().max()
        allowed = 2 * ((other - reference).abs().max() + u * scale)
        assert (mine - reference).abs().max() <= allowed


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_wanted_is_not_computed(onednn, form):
    tensors = [torch.randn(shape) for shape in ((5, 8), (6, 8), (6,), (5, 6))]
    everything = [None] * 4
    for wanted in ([0, 1, 2, 3], [0], [1, 2], [2], [3]):
        leaves = [t.clone().requires_grad_(n in wanted) for n, t in enumerate(tensors)]
        y = fused(form, *leaves)
        if form != "add" and wanted == [3]:
            assert not y.requires_grad
            continue
        y.backward(torch.ones_like(y))
        for number, leaf in enumerate(leaves):
            if len(wanted) == 4:
                everything[number] = leaf.grad
            elif number in wanted:
                assert torch.equal(leaf.grad, everything[number])
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_batched_gradients(onednn, form):
    tensors = [torch.randn(shape) for shape in ((5, 8), (6, 8), (6,), (5, 6))]
    leaf = tensors[0].requires_grad_()
    y = fused(form, *tensors)
    dy = torch.randn(3, *y.shape)
    (together,) = torch.autograd.grad(y, leaf, dy, is_grads_batched=True, retain_graph=True)
    for number in range(3):
        (alone,) = torch.autograd.grad(y, leaf, dy[number], retain_graph=True)
        torch.testing.assert_close(together[number], alone, rtol=0, atol=2e-5)


def make(name="BertModel"):
    """Sums so long that two orders of them differ; no dropout."""
    torch.manual_seed(0)
    if name == "torch.nn":
        options = dict(dropout=0.0, batch_first=True, activation="gelu")
        layer = torch.nn.TransformerEncoderLayer(128, 4, 512, **options)
        return bertfast.optimize(torch.nn.TransformerEncoder(layer, 2)).eval()
    pytest.importorskip("transformers")
    from support.hf_models import tiny  # not above: a process of one test does without

    if name == "DistilBertModel":
        config = dict(dim=128, hidden_dim=512, dropout=0.0, attention_dropout=0.0)
    else:
        config = dict(hidden_size=128, intermediate_size=512)
        config |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return bertfast.optimize(tiny(name, **config))


def run(model, inputs):
    if "input_ids" in inputs:
        return model(**inputs)[0]
    return model(inputs["x"], src_key_padding_mask=inputs["padding"])


def inputs_of(name):
    torch.manual_seed(1)
    lengths = (5, 20, 13, 40)
    if name == "torch.nn":
        padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        return {"x": torch.randn(*padding.shape, 128), "padding": padding}
    from support.hf_models import batch

    return batch(lengths)


NAMES = ("BertModel", "DistilBertModel", "torch.nn")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_change_no_bit(onednn, name, training):
    model, inputs = make(name).train(training), inputs_of(name)
    expected = run(model, inputs)
    assert expected.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(run(model, inputs), expected)
    model.requires_grad_(False)
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_goes_by_its_own_mode(onednn, name):
    """One layer is in training and the other isn't: each has the bits of its mode."""
    model, inputs = make(name), inputs_of(name)
    layers = model.layers if name == "torch.nn" else model.encoder_layers()
    layers[0].train()
    mixed = run(model, inputs)
    with torch.no_grad():
        assert torch.equal(run(model, inputs), mixed)
    layers[0].eval()
    assert not torch.equal(run(model, inputs), mixed)  # two orders of the sums: the test can fail


@pytest.mark.parametrize("gradients", [False, True])
def test_eight_threads(onednn, gradients):
    """Each comes to a process that hasn't decided yet."""
    model, inputs = make(), inputs_of("BertModel")
    cpu_linear.forget()

    def once(_):
        with torch.set_grad_enabled(gradients):
            return run(model, inputs).detach()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(once, range(32))
    assert all(torch.equal(first, other) for other in others)


def digest(name):
    """Of the outputs with and without gradients, for another process to print."""
    torch.set_num_threads(1)
    model, inputs, total = make(name), inputs_of(name), hashlib.sha256()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            total.update(run(model, inputs).detach().numpy().tobytes())
    return total.hexdigest()


def test_two_processes_of_which_one_is_under_load():
    """From the moment on at which it imports bertfast, which nothing has decided before."""
    one = "import pytest, torch; input(); import test_cpu_linear as t; print(t.digest('torch.nn'))"
    load = "import time; end = time.time() + 300; print(flush=True)\n"
    load += "while time.time() < end: sum(range(1000))"
    found = []
    with contextlib.ExitStack() as stack:

        def start(program):
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            command = [sys.executable, "-c", program]
            process = subprocess.Popen(command, **pipes, cwd=Path(__file__).parent)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        for process, others in zip([start(one), start(one)], (0, 3), strict=True):
            loads = [start(load) for _ in range(others)]
            assert [each.stdout.readline() for each in loads] == ["\n"] * others
            found.append(process.communicate("\n")[0])
            assert all(each.poll() is None for each in loads)
    assert len(found[0]) == 65 and found[0] == found[1]
