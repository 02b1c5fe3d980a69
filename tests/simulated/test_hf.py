"""Converted Hugging Face models on a device that is not the current one: their numbers, and how
often the host waits."""

import copy
import math

import pytest
import torch
from support.hf_models import FAMILIES, batch, packs, tiny
from support.simulated_gpu import cuda, kernels
from torch import nn

import bertfast
from bertfast.testing.budget import UNIT_ROUNDOFF, worst
from bertfast.testing.model import beside_stock

transformers = pytest.importorskip("transformers")

DEVICE = "cuda:1"
DROPOUT = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
HALF = torch.bfloat16  # which CUDA's attention takes; Triton's interpreter is much slower


def small(name="BertModel", dtype=HALF, **config):
    return tiny(name, **config).to(DEVICE, dtype)


def on(device, inputs):
    return {name: value.to(device) for name, value in inputs.items()}


def check(model, inputs, real=None, **options):
    """By the budget of whole models, forward and backward; fused kernels ran on the device."""
    inputs = on(DEVICE, inputs)
    if real is None:
        real = inputs["attention_mask"].bool()
    kernels.launches.clear()
    found = beside_stock(model, lambda m: bertfast.optimize(m, **options), inputs, real)
    assert worst([finding for finding, _ in found]).ok, worst([f for f, _ in found])
    assert {launch.device for launch in kernels.launches} == {1}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    check(small(family + "Model"), batch())


def test_in_float32():
    """Attention by Triton, all else by CUDA."""
    check(small(dtype=torch.float32, num_hidden_layers=1), batch((3, 9)))
    assert {launch.kernel for launch in kernels.launches} > {
        *("attention_fwd_kernel", "attention_bwd_dkv_kernel"),
        *("layer_norm_forward", "bias_gelu_backward"),
    }


@pytest.mark.parametrize("head", ["BertForMultipleChoice", "DistilBertForQuestionAnswering"])
def test_heads(head):
    inputs, real = batch(lengths=(5, 9, 20, 13)), None
    if head.endswith("MultipleChoice"):
        inputs = {name: value.unflatten(0, (2, 2)) for name, value in inputs.items()}
        real = torch.zeros(0)
    check(small(head), inputs, real)


def steps(model, inputs, dtype=None):
    """Output and gradients, with dropout if the model trains."""
    torch.manual_seed(3)
    model.zero_grad()
    device = inputs["input_ids"].device
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        hidden = model(**inputs)[0]
    hidden[inputs["attention_mask"].bool()].float().square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.to("cpu", copy=True) for name, value in grads.items()} | {
        "hidden": hidden.detach().cpu()
    }


def same(got, expected):
    assert got.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(got[name], value)]


LAYOUTS = {
    "packed": (dict(), dict()),
    "padded": (dict(), dict(packed=False)),
    "left": (dict(side="left"), dict()),
    "none": (dict(lengths=(12, 12)), dict()),
    "recompute": (dict(), dict(recompute=True)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_are_those_of_the_same_kernels_on_a_cpu(layout):
    """A step with dropout: what only a GPU's tensors take the way of changes nothing."""
    how, options = LAYOUTS[layout]
    model = bertfast.optimize(tiny(**DROPOUT).to(HALF), backend="cuda", **options).train()
    inputs = batch(**how)
    expected = steps(model, inputs)
    same(steps(copy.deepcopy(model).to(DEVICE), on(DEVICE, inputs)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Each product rounds its operands to 16 bits, on the way of torch's own autocast."""
    stock, inputs = small(dtype=torch.float32), on(DEVICE, batch())
    model = bertfast.optimize(copy.deepcopy(stock))
    exact = steps(stock, inputs)
    real = inputs["attention_mask"].bool().cpu()

    def error(found, name):
        difference = found[name] - exact[name]
        return (difference[real] if name == "hidden" else difference).double().norm()

    expected, got = steps(stock, inputs, dtype), steps(model, inputs, dtype)
    for name in exact:
        assert got[name].dtype == expected[name].dtype, name
    # The gradients of keys' biases cancel to nothing: what is left is rounding alone.
    names = [name for name in exact if not name.endswith("key.bias")]
    ratio = sum(error(got, n) / error(expected, n) for n in names) / len(names)
    assert ratio < 1.5, ratio


@pytest.mark.parametrize("kind", ["set_default_device", "context"])
def test_a_default_device(kind):
    """It is a mode on torch's stack, which changes nothing: packed, fused, and reported so."""
    model, inputs = bertfast.optimize(small()), on(DEVICE, batch())
    expected = steps(model, inputs)
    if kind == "context":
        with torch.device(DEVICE):
            seen, got, rows = packs(model, inputs), steps(model, inputs), bertfast.report(model)
    else:
        torch.set_default_device(DEVICE)
        try:
            seen, got, rows = packs(model, inputs), steps(model, inputs), bertfast.report(model)
        finally:
            torch.set_default_device(None)
    assert seen and rows.notes == []
    same(got, expected)


def test_the_current_device_stays_the_current_one():
    model, inputs = bertfast.optimize(small()), on(DEVICE, batch())
    assert torch.cuda.current_device() == 0
    steps(model, inputs)
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        steps(model, inputs)
        assert torch.cuda.current_device() == 1


def test_moved_copied_and_back():
    """Weights that a converted model has gathered, on each device anew."""
    model, inputs = bertfast.optimize(tiny(**DROPOUT).to(HALF), backend="cuda").train(), batch()
    expected = steps(model, inputs)
    model.to("cuda:0")
    same(steps(model, on("cuda:0", inputs)), expected)
    other = copy.deepcopy(model)
    same(steps(other, on("cuda:0", inputs)), expected)
    same(steps(model.to("cuda:1"), on("cuda:1", inputs)), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    same(steps(model, on("cuda:1", inputs)), expected)
    same(steps(model.cpu(), inputs), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing(reentrant):
    model, inputs = bertfast.optimize(small(**DROPOUT)).train(), on(DEVICE, batch())
    model.embeddings.dropout.p = 0.0  # it draws for the padded batch, as a hook then hangs there
    expected = steps(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = steps(model, inputs)
    in_layers = [name for name in expected if "embeddings" not in name]
    same({name: got[name] for name in in_layers}, {name: expected[name] for name in in_layers})


def waits_of(call):
    call()  # gathers weights, once
    before = cuda.waits()
    call()
    return cuda.waits() - before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_forward_waits_once(family, training):
    model = bertfast.optimize(small(family + "Model")).train(training)
    inputs = on(DEVICE, batch())
    assert packs(model, inputs)
    assert waits_of(lambda: model(**inputs)) == 1, cuda.last_wait()


NO_WAITS = {
    "no mask": dict(),
    "packed=False": dict(packed=False),
    "a mask on the host": dict(packed="always"),
}


@pytest.mark.parametrize("layout", NO_WAITS)
def test_a_forward_that_waits_for_nothing(layout):
    model, inputs = bertfast.optimize(small(), **NO_WAITS[layout]), on(DEVICE, batch())
    if layout == "no mask":
        del inputs["attention_mask"]
    elif layout == "a mask on the host":
        inputs["attention_mask"] = inputs["attention_mask"].cpu()
        assert packs(model, inputs)
    assert waits_of(lambda: model(**inputs)) == 0, cuda.last_wait()


def test_a_mask_on_the_host_beside_tokens_that_have_to_be_looked_at():
    """Without packed="always" what is masked must be the padding token."""
    model, inputs = bertfast.optimize(small()), on(DEVICE, batch())
    inputs["attention_mask"] = inputs["attention_mask"].cpu()
    assert packs(model, inputs)
    assert waits_of(lambda: model(**inputs)) == 1, cuda.last_wait()


def test_a_backward_waits_for_nothing():
    model, inputs = bertfast.optimize(small()).train(), on(DEVICE, batch())
    weight = torch.randn(3, 20, 64, device=DEVICE)

    def backward():
        loss = (model(**inputs)[0] * weight).sum()
        before = cuda.waits()
        loss.backward()
        return cuda.waits() - before

    backward()
    assert backward() == 0, cuda.last_wait()


def within_roundings(got, expected):
    """Holds two runs of the two layers of `small` to each other. On its way a value is rounded some
    ten times a layer, by a standard deviation of u / sqrt(3) of its size, in a random walk:
    sqrt(20 / 3) u, and sqrt(2) times that between two runs. The largest of some thousand values is
    3.5 standard deviations off: 3.5 sqrt(2 / 3) = 2.9."""
    u = UNIT_ROUNDOFF[expected.dtype]
    atol = 2.9 * math.sqrt(20) * u * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0.0, atol=atol)


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize("longest", [True, False])
@pytest.mark.parametrize("how", ["optimize", "attn_implementation"])
def test_packed_by_the_caller(how, where, longest):
    """Batches of transformers' collator, cu_seq_lens on either device."""
    if how == "optimize":
        model, inputs = bertfast.optimize(small()), on(DEVICE, batch())
    else:
        model = small(attn_implementation="bertfast", dtype=torch.float16)
        inputs = on(DEVICE, batch())
    real = inputs["attention_mask"].bool()
    expected = model(**inputs)[0][real]
    lengths = inputs["attention_mask"].sum(1)
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(where)
    ids = inputs["input_ids"][real][None]
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in lengths.tolist()])[None]
    packed = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    if longest:
        packed |= dict(max_length_q=20, max_length_k=20)

    def call():
        return model(input_ids=ids, position_ids=positions, **packed)[0]

    if how == "optimize":
        assert torch.equal(call()[0], expected)
        assert waits_of(call) == (0 if longest or where == "cpu" else 1), cuda.last_wait()
    else:  # the first layer's attention asks, and the bounds keep the answer
        assert waits_of(call) == 0, cuda.last_wait()

        def with_new_bounds():
            packed.update(dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds.clone()))
            call()

        known = longest or where == "cpu"
        assert waits_of(with_new_bounds) == (0 if known else 1), cuda.last_wait()
        # The linear layers see other shapes.
        within_roundings(call()[0], expected)


@pytest.mark.parametrize("bounds", [[0, 5, 37], [0, 9, 5, 38], [1, 5, 38]])
def test_wrong_bounds_on_the_host_raise(bounds):
    """Which a kernel would follow out of its memory."""
    model = bertfast.optimize(small())
    bounds = torch.tensor(bounds, dtype=torch.int32)
    ids = torch.full((1, 38), 7, device=DEVICE)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        model(input_ids=ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=38)


def test_nothing_waits_in_a_capture():
    """After an ordinary warm-up, which packs, the captured forward does what a graph may hold."""
    model, inputs = bertfast.optimize(small(dtype=torch.float16)), on(DEVICE, batch())
    with torch.no_grad():
        expected = model(**inputs)[0]
        with cuda.capture():
            got = model(**inputs)[0]
    real = inputs["attention_mask"].bool()
    within_roundings(got[real], expected[real])


def test_streams_of_their_own(simulated_faults):
    """Weights are gathered by the first call, on its stream. The second, on another, reads them
    after they were filled, and what was there before is freed after the last call that read it."""
    model, inputs = bertfast.optimize(small()), on(DEVICE, batch())
    del inputs["attention_mask"]  # for which the host would wait
    model(**inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.clone()  # so that the next call gathers
    streams = [torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)]
    torch.cuda.synchronize(DEVICE)
    kept = []
    for stream in streams:
        with torch.no_grad(), torch.cuda.stream(stream):
            kept.append(model(**inputs)[0])
    torch.cuda.synchronize(DEVICE)
    assert not simulated_faults()
    assert torch.equal(*kept)
    torch.cuda.synchronize(DEVICE)


def test_weights_that_another_thread_reads_while_they_are_gathered(monkeypatch):
    """Tensors that it reads on a stream of its own are freed after that."""
    model, inputs = bertfast.optimize(small()), on(DEVICE, batch())
    query = model.encoder.layer[0].attention.self.query.weight
    stream = torch.cuda.Stream(DEVICE)
    torch.cuda.synchronize(DEVICE)
    from_dlpack, kept = torch.from_dlpack, []

    def read_meanwhile(part):
        with torch.no_grad(), torch.cuda.stream(stream):
            kept.append(query.sum())
        return from_dlpack(part)

    monkeypatch.setattr(torch, "from_dlpack", read_meanwhile)
    model(**inputs)
    assert kept
    torch.cuda.synchronize(DEVICE)
