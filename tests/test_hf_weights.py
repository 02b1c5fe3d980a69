"""The weights stay the model's own: joined or not, moved, changed, copied, saved.

On a GPU q, k and v are one product of weights that lie side by side. The tests force this on a CPU
with Triton's kernels in the interpreter.
"""

import copy
import io
import pickle
import threading
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from support.hf_models import batch, packs, tiny
from torch import nn

import bertfast
from bertfast.nn.joined import JoinedWeights, joined_product, same_form
from bertfast.ops import available
from bertfast.testing.model import HIDDEN_ATOL

transformers = pytest.importorskip("transformers")

ON_TRITON = pytest.mark.triton


def three(width=8, out=8, bias=True):
    return tuple(nn.Linear(width, out, bias=bias) for _ in range(3))


def separate(linears, x):
    return torch.cat([linear(x) for linear in linears], -1)


def agree(linears, joined, x=None):
    x = torch.randn(2, 5, linears[0].in_features) if x is None else x
    with torch.no_grad():
        expected = separate(linears, x)
        torch.testing.assert_close(joined_product(linears, x, joined), expected)


def together(linears) -> bool:
    q, k, v = (linear.weight for linear in linears)
    return k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == q.nbytes


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_is_three(bias):
    linears, x = three(bias=bias), torch.randn(2, 5, 8, requires_grad=True)
    before = [[p.clone() for p in linear.parameters()] for linear in linears]
    joined = JoinedWeights(linears)
    out = joined_product(linears, x, joined)
    assert together(linears)
    for linear, old in zip(linears, before, strict=True):
        assert all(map(torch.equal, linear.parameters(), old))
    weight = torch.randn_like(out)
    wanted = [x, *(p for linear in linears for p in linear.parameters())]
    got = torch.autograd.grad(out, wanted, weight)
    expected = torch.autograd.grad(separate(linears, x), wanted, weight)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_each_weight_owns_its_storage():
    linears = three()
    agree(linears, JoinedWeights(linears))
    for linear in linears:
        for parameter in linear.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_frozen_weights_get_no_gradient():
    linears = three()
    linears[1].weight.requires_grad_(False)
    linears[2].bias.requires_grad_(False)
    joined_product(linears, torch.randn(4, 8), JoinedWeights(linears)).sum().backward()
    grads = [p.grad is not None for linear in linears for p in linear.parameters()]
    assert grads == [True, True, False, True, True, False]


WRITES = {
    "data.mul_": lambda q: q.weight.data.mul_(2),
    "bias.data.add_": lambda q: q.bias.data.add_(1),
    "data =": lambda q: setattr(q.weight, "data", torch.randn(8, 8)),
    "transposed data": lambda q: setattr(q.weight, "data", q.weight.data.t()),
    "new parameter": lambda q: setattr(q, "weight", nn.Parameter(torch.randn(8, 8))),
    "load_state_dict": lambda q: q.load_state_dict(nn.Linear(8, 8).state_dict()),
    "load, assign": lambda q: q.load_state_dict(nn.Linear(8, 8).state_dict(), assign=True),
    "bias moved": lambda q: setattr(q.bias, "data", torch.randn(8)),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_after_joining_is_seen(how):
    linears = three()
    joined = JoinedWeights(linears)
    agree(linears, joined)
    with torch.no_grad():
        WRITES[how](linears[1])
    agree(linears, joined)
    agree(linears, joined)


def test_narrowed_in_place():
    """The address stays and the shape doesn't."""
    linears = three()
    joined = JoinedWeights(linears)
    agree(linears, joined)
    for linear in linears:
        linear.weight.data = linear.weight.data[:4]
        linear.bias.data = linear.bias.data[:4]
    agree(linears, joined)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype(dtype):
    """`.to` keeps the Parameter object."""
    holder = nn.ModuleList(three())
    joined = JoinedWeights(tuple(holder))
    agree(tuple(holder), joined)
    holder.to(dtype)
    agree(tuple(holder), joined, torch.randn(3, 8, dtype=dtype))


def test_a_changed_weight_is_noticed_before_the_backward():
    linears = three()
    out = joined_product(linears, torch.randn(2, 8, requires_grad=True), JoinedWeights(linears))
    with torch.no_grad():
        linears[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_views_and_shared_weights_stay_where_they_are():
    flat = torch.randn(4 * 64)
    linears = three()
    for n, linear in enumerate(linears):
        linear.weight.data = flat[64 * n : 64 * (n + 1)].view(8, 8)  # as in a flattened shard
    places = [linear.weight.data_ptr() for linear in linears]
    joined = JoinedWeights(linears)
    agree(linears, joined)
    assert places == [linear.weight.data_ptr() for linear in linears]
    shared = three()
    shared[1].weight = shared[0].weight
    agree(shared, JoinedWeights(shared))
    assert shared[1].weight is shared[0].weight


def test_shared_memory_stays_shared():
    """As in Hogwild: several processes train the same weights."""
    linears = three()
    for linear in linears:
        linear.share_memory()
    places = [p.data_ptr() for linear in linears for p in linear.parameters()]
    joined = JoinedWeights(linears)
    agree(linears, joined)
    assert places == [p.data_ptr() for linear in linears for p in linear.parameters()]
    assert all(p.is_shared() for linear in linears for p in linear.parameters())


def test_weights_sent_to_another_process_stay_where_they_are():
    """On both sides. A GPU's tensors don't say that they are shared; the sending does."""
    linears, joined = three(), JoinedWeights()
    received = pickle.loads(ForkingPickler.dumps(joined))
    for one in (joined, received):
        agree(linears, one)
        assert not together(linears)
    agree(linears, pickle.loads(pickle.dumps(JoinedWeights())))
    assert together(linears)


@ON_TRITON
def test_a_model_in_shared_memory_is_trained_there(fused):
    model = copy.deepcopy(fused[1])
    model.share_memory()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    model(**small())[0].sum().backward()
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(p.is_shared() for p in model.parameters())


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        linears = three()
        x = torch.randn(2, 8)
        expected = separate(linears, x)
        joined = JoinedWeights(linears)
        torch.testing.assert_close(joined_product(linears, x, joined), expected)
    with torch.no_grad():
        torch.testing.assert_close(joined_product(linears, x, joined), expected)
    ordinary = three()
    with torch.inference_mode():  # the first call is in inference mode, then there is training
        joined = JoinedWeights(ordinary)
        joined_product(ordinary, x, joined)
    joined_product(ordinary, torch.randn(2, 8), joined).sum().backward()


def test_what_forms_are_joined():
    q, k, v = three()
    assert same_form((q, k, v))
    assert not same_form((q, k, nn.Linear(8, 4)))
    assert not same_form((q, k, nn.Linear(8, 8, bias=False)))
    assert not same_form((q, k.half(), v))


def test_threads_that_join_at_once():
    for _ in range(20):
        linears = three(64, 64)
        joined = JoinedWeights(linears)
        x = torch.randn(4, 64)
        expected = separate(linears, x).detach()
        wrong = []

        def work(x=x, linears=linears, joined=joined, expected=expected, wrong=wrong):
            with torch.no_grad():
                if not torch.allclose(joined_product(linears, x, joined), expected, atol=1e-5):
                    wrong.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        linears[0].weight.data.mul_(2)
        agree(linears, joined, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    linears, x = three(), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out = joined_product(linears, x, JoinedWeights(linears))
        expected = separate(linears, x)
    assert out.dtype == expected.dtype == dtype
    assert torch.equal(out, expected)
    wanted = [x, *(linear.weight for linear in linears)]
    weight = torch.randn_like(out)
    got, *weights = torch.autograd.grad(out, wanted, weight)
    other, *others = torch.autograd.grad(expected, wanted, weight)
    assert got.dtype == other.dtype
    u = torch.finfo(dtype).eps / 2
    parts = weight.double().split(8, -1)
    used = [linear.weight.detach().to(dtype).double() for linear in linears]
    first, second, third = (part @ one for part, one in zip(parts, used, strict=True))
    # Three gradients of x are rounded to 16 bits and added, or one sum is rounded once: of each
    # element six roundings by u, at most u (|g1| + |g2| + |g3| + |g1 + g2| + 2 |g|), of numbers
    # that may be rounded themselves. Before that float32 sums 8 products, or 24.
    sizes = first.abs() + second.abs() + third.abs() + (first + second).abs()
    exact = sum(part.abs() @ one.abs() for part, one in zip(parts, used, strict=True))
    most = u * (1 + u) ** 2 * (sizes + 2 * (first + second + third).abs()) + 32 * 2**-24 * exact
    assert ((got.double() - other.double()).abs() <= most).all()
    # Weights' gradients are one sum of 4 products, rounded once in either way.
    rows = x.detach().to(dtype).double()
    for a, b, part in zip(weights, others, parts, strict=True):
        most = 2 * u * (part.t() @ rows).abs() + 8 * 2**-24 * (part.t().abs() @ rows.abs())
        assert a.dtype == b.dtype and ((a.double() - b.double()).abs() <= most * (1 + u)).all()


# The whole model.


@pytest.fixture
def fused():
    """A converted model whose weights are joined, and its stock twin."""
    reason = available("cpu")["attention_qkv"]["triton"]
    if reason is not None:
        pytest.skip(reason)
    stock = tiny("BertForMaskedLM", num_hidden_layers=1)
    model = bertfast.optimize(copy.deepcopy(stock), backend="triton")
    with torch.no_grad():
        model(**small())
    attention = model.bert.encoder.layer[0].attention.self
    assert together((attention.query, attention.key, attention.value))
    return stock, model


def small():
    return batch((3, 6))


def same_results(model, stock, backend="triton"):
    inputs = small()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        got = bertfast.optimize(model, backend=backend)(**inputs).logits[real]
        torch.testing.assert_close(got, stock(**inputs).logits[real], rtol=0, atol=1e-4)


@ON_TRITON
@pytest.mark.parametrize(
    "kind, when",
    [("adamw", "before"), ("adamw", "after"), ("adamw fused", "after"), ("sgd", "after")],
)
def test_optimisers(fused, kind, when):
    def optimiser(model):
        if kind == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=kind == "adamw fused", eps=1e-2)

    stock, model = fused
    if when == "before":
        model = copy.deepcopy(stock)
        step = optimiser(model)
        bertfast.optimize(model, backend="triton")
    else:
        step = optimiser(model)
    steps = [(stock, optimiser(stock)), (model, step)]
    inputs = small()
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    for _ in range(2):
        for one, its in steps:
            its.zero_grad()
            one(**inputs, labels=labels).loss.backward()
            its.step()
    for (name, a), b in zip(model.named_parameters(), stock.parameters(), strict=True):
        if not name.endswith("key.bias"):  # whose gradient is nothing but rounding
            torch.testing.assert_close(a, b, rtol=0, atol=HIDDEN_ATOL, msg=name)
    same_results(model, stock)


@ON_TRITON
def test_copies(fused):
    stock, model = fused
    again = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again.append(torch.load(stream, weights_only=False))
    for one in again:
        same_results(one, stock)
    with torch.no_grad():
        again[0].bert.encoder.layer[0].attention.self.query.weight.mul_(3)
    same_results(model, stock)


def state_of(folder):
    safetensors = pytest.importorskip("safetensors.torch", reason="reads what was saved")
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(safetensors.load_file(file))
    return found


SAVERS = ["save_pretrained", "safetensors", "hub", "accelerate", "accelerate state", "torch"]


@ON_TRITON
@pytest.mark.parametrize("saver", SAVERS)
def test_every_saver_writes_every_tensor(fused, saver, tmp_path):
    stock, model = fused
    if saver == "save_pretrained":
        model.save_pretrained(tmp_path)
        again = transformers.BertForMaskedLM.from_pretrained(tmp_path)
        assert type(again).__module__.startswith("transformers.")
    else:
        if saver == "safetensors":
            from safetensors.torch import save_model

            save_model(model, str(tmp_path / "model.safetensors"))
        elif saver == "hub":
            from huggingface_hub import save_torch_model

            save_torch_model(model, str(tmp_path))
        elif saver == "torch":
            torch.save(model.state_dict(), tmp_path / "model.pt")
        else:
            accelerate = pytest.importorskip("accelerate", reason="its saver is tested")
            accelerator = accelerate.Accelerator(cpu=True)
            if saver == "accelerate":
                accelerator.save_model(model, str(tmp_path))
            else:
                accelerator.prepare(model)
                accelerator.save_state(str(tmp_path))
        again = copy.deepcopy(stock)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        found = torch.load(tmp_path / "model.pt") if saver == "torch" else state_of(tmp_path)
        missing, unexpected = again.load_state_dict(found, strict=False)
        assert not unexpected
        assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    for (name, a), b in zip(stock.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@ON_TRITON
def test_the_same_keys_and_ties(fused):
    stock, model = fused
    assert list(model.state_dict()) == list(stock.state_dict())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    model.load_state_dict(stock.state_dict())
    model.resize_token_embeddings(120)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    model(**small())


@ON_TRITON
def test_to_half_and_back(fused):
    stock, model = fused
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        stock.to(dtype)
    same_results(model, stock)
    model.half()(**small())
    same_results(model.float(), stock.half().float())


def test_from_pretrained_round_trip_on_torch(tmp_path):
    model = bertfast.optimize(tiny())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    inputs = batch()
    assert torch.equal(again(**inputs)[0], bertfast.revert(model)(**inputs)[0])
    assert packs(bertfast.optimize(again), inputs)
    assert "bertfast" not in (tmp_path / "config.json").read_text()
