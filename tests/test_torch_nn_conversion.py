"""A converted torch.nn.TransformerEncoder stays the same module: what hangs on it, what it saves,
what others put into it, and the way back."""

import copy
import io
import pickle

import pytest
import torch
from support.torch_nn_models import (
    HEADS,
    INNER,
    RIGHT,
    WIDTH,
    assert_near,
    assert_same,
    converted,
    inputs,
    make,
    outputs_and_grads,
    training_path,
)
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune

import bertfast
from bertfast import torch_nn

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
REAL = ~RIGHT[..., None]


def types(model):
    return [type(module) for module in model.modules()]


# ---- conversion and the way back


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_revert_gives_back_the_types_and_the_bits(norm_first):
    model = make(norm_first=norm_first).eval()
    before, attributes = types(model), [set(module.__dict__) for module in model.modules()]
    parameters = {name: id(value) for name, value in model.named_parameters()}
    x = inputs()
    with torch.no_grad():
        want = model(x, src_key_padding_mask=RIGHT)
        bertfast.optimize(bertfast.optimize(model, packed=False))
        assert types(model) != before
        assert not torch.equal(model(x, src_key_padding_mask=RIGHT), want)  # other sums
        with bertfast.disabled():
            assert torch.equal(model(x, src_key_padding_mask=RIGHT), want)
        bertfast.revert(model)
        assert torch.equal(model(x, src_key_padding_mask=RIGHT), want)
    assert types(model) == before
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert {name: id(value) for name, value in model.named_parameters()} == parameters


def test_the_converted_classes_are_subclasses_of_the_same_name():
    model = converted(make())
    for module in (model, model.layers[0]):
        kind = type(module)
        assert kind is getattr(torch_nn, kind.__name__)
        assert issubclass(kind, getattr(nn, kind.__name__))
    assert model.state_dict().keys() == make().state_dict().keys()


def test_copies_and_pickles_are_converted_too():
    model, x = converted(make(layers=1, activation=nn.GELU("tanh"))), inputs()
    want = outputs_and_grads(model, x, src_key_padding_mask=RIGHT)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert types(other) == types(model)
        got = outputs_and_grads(other, x, src_key_padding_mask=RIGHT)
        for name, value in want.items():
            assert torch.equal(got[name], value)
        assert type(bertfast.revert(other)) is nn.TransformerEncoder


def test_state_dicts_go_both_ways():
    stock, model = make(), converted(make())
    model.load_state_dict(stock.state_dict())
    assert_same(model, stock, inputs(), REAL, src_key_padding_mask=RIGHT)
    other = make()
    other.load_state_dict(model.state_dict())
    assert_same(model, other, inputs(), REAL, src_key_padding_mask=RIGHT)


@pytest.mark.parametrize("write", ["step", "data", "to", "new parameter"])
def test_weights_written_after_the_conversion_count(write):
    stock, x = make(), inputs()
    model = converted(stock)
    model(x)
    for one in (stock, model):
        one(x).pow(2).sum().backward()
        weight = one.layers[0].self_attn.in_proj_weight
        if write == "step":
            torch.optim.SGD(one.parameters(), 1e-2).step()
        elif write == "data":
            weight.data.mul_(2.0)
        elif write == "to":
            one.to(torch.float32).to(torch.float64)
        else:
            one.layers[0].self_attn.in_proj_weight = nn.Parameter(weight.detach() * 2.0)
    with training_path():
        want = outputs_and_grads(stock, x)
    got = outputs_and_grads(model, x)
    # After a step the weights themselves differ by rounding errors, times a gradient's size.
    for name in want if write != "step" else ():
        assert_near(got[name], want[name])
    torch.testing.assert_close(got["output"], want["output"], rtol=0.0, atol=1e-9)


def test_only_the_layer_is_converted():
    """Then torch's encoder gives it nested tensors in eval, and masks of 0 and -Inf otherwise."""
    stock = make(norm=False)
    model = copy.deepcopy(stock)
    for layer in model.layers:
        bertfast.optimize(layer)
    assert type(model) is nn.TransformerEncoder
    assert_same(model, stock, inputs(), REAL, src_key_padding_mask=RIGHT)
    again = nn.TransformerEncoder(model.layers[0], 2).to(torch.float64)  # made of copies
    assert type(again.layers[1]) is torch_nn.TransformerEncoderLayer
    reference = nn.TransformerEncoder(stock.layers[0], 2)
    assert_same(again, reference, inputs(), REAL, src_key_padding_mask=RIGHT)


def test_inside_nn_transformer():
    stock = nn.Transformer(WIDTH, HEADS, 2, 1, INNER, 0.0, batch_first=True).double().eval()
    model, x = converted(stock), inputs()
    masks = dict(src_key_padding_mask=RIGHT, memory_key_padding_mask=RIGHT)
    with training_path(), torch.no_grad():
        want = stock(x, x, **masks)
    assert_near(model(x, x, **masks).detach(), want)
    rows = {row.name: row.reason for row in bertfast.report(model)}
    assert rows == {
        "encoder.layers.0": None,
        "encoder.layers.1": None,
        "decoder.layers.0": "bertfast doesn't know this class",
    }


class OwnLayer(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        return 2.0 * super().forward(*args, **kwargs)


def test_a_layer_of_somebody_else_is_left_alone():
    layer = OwnLayer(WIDTH, HEADS, INNER, 0.0, batch_first=True, dtype=torch.float64)
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = converted(stock)
    assert {type(layer) for layer in model.layers} == {OwnLayer}
    assert_same(model, stock, inputs(), src_key_padding_mask=RIGHT)
    model.layers[1] = copy.deepcopy(make().layers[0])  # converted beside one that isn't
    stock.layers[1] = copy.deepcopy(model.layers[1])
    bertfast.optimize(model)
    assert_same(model, stock, inputs(), src_key_padding_mask=RIGHT)
    statuses = [row.status for row in bertfast.report(model)]
    assert statuses == ["bertfast doesn't know this class", "fused"]
    with pytest.raises(ValueError, match="knows no module of OwnLayer"):
        bertfast.optimize(layer, strict=True)


# ---- hooks

HOOKED = ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "length-first"])
@pytest.mark.parametrize("where", ["", *HOOKED])
def test_hooks_see_what_they_saw_before(where, batch_first):
    stock = make(batch_first=batch_first)
    model = converted(stock)
    x = inputs() if batch_first else inputs().transpose(0, 1)
    seen = {}
    for one in (stock, model):
        records = seen[one] = []

        def record(module, args, output, records=records):
            output = output[0] if isinstance(output, tuple) else output
            records.append((args[0].detach(), output.detach()))

        one.layers[1].get_submodule(where).register_forward_hook(record)
    assert_same(model, stock, x, src_key_padding_mask=RIGHT)  # nothing is packed
    assert len(seen[stock]) == 1 and len(seen[model]) == 2  # with and without gradients
    for records in seen[model]:
        for got, want in zip(records, seen[stock][0], strict=True):
            assert_near(got, want)
    reason = bertfast.report(model)[1].reason
    kind = type(model.layers[1].get_submodule(where)).__name__
    assert reason == (f"a hook on its {kind} has to be called" if where else None)


def test_pre_and_backward_hooks_are_called():
    calls = []
    model = converted(make(layers=1))
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append("layer"))
    model.layers[0].linear1.register_full_backward_hook(lambda *_: calls.append("linear1"))
    model(inputs()).sum().backward()
    assert calls == ["layer", "linear1"]


# ---- what else may stand in a layer


class Doubled(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Wrapped(nn.Module):
    """As adapters do: the Linear and something beside it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.extra = nn.Linear(linear.in_features, linear.out_features, dtype=torch.float64)

    def forward(self, x):
        return self.linear(x) + self.extra(x)


def doubled(linear):
    other = Doubled(linear.in_features, linear.out_features, dtype=torch.float64)
    other.load_state_dict(linear.state_dict())
    return other


def parametrized(linear):
    return parametrizations.weight_norm(linear)


def pruned(linear):
    return prune.l1_unstructured(linear, "weight", 0.5)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("change", [Wrapped, doubled, parametrized, pruned])
def test_linears_that_are_more_than_a_product_are_called(change, norm_first):
    stock = make(layers=1, norm_first=norm_first)
    model, x = converted(stock), inputs()
    for one in (stock, model):
        torch.manual_seed(0)
        for name in ("linear1", "linear2"):
            setattr(one.layers[0], name, change(getattr(one.layers[0], name)))
    assert_same(model, stock, x, REAL, src_key_padding_mask=RIGHT)


def test_linears_are_called_where_the_kernels_add_biases(target, need, finest):
    need("attention_qkv", target)
    backend, device = target
    dtype = finest("attention_qkv", target)
    stock = make(layers=1, dtype=dtype)
    for name in ("linear1", "linear2"):
        setattr(stock.layers[0], name, doubled(getattr(stock.layers[0], name)).to(dtype))
    model, x = converted(stock, backend=backend).to(device), inputs(dtype)
    with training_path():
        want = outputs_and_grads(stock, x)
    got = outputs_and_grads(model, x.to(device))
    for name, value in want.items():
        assert_near(got[name].cpu(), value)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_other_norms_and_dropouts_are_called(norm_first):
    stock = make(layers=1, norm_first=norm_first)
    layer = stock.layers[0]
    layer.norm1 = nn.RMSNorm(WIDTH, dtype=torch.float64)
    layer.norm2 = nn.LayerNorm(WIDTH, eps=0.1, elementwise_affine=False)
    layer.dropout1, layer.dropout2 = nn.Identity(), nn.Hardtanh(-0.5, 0.5)
    assert_same(converted(stock), stock, inputs(), REAL, src_key_padding_mask=RIGHT)


def test_one_layer_may_differ_from_another():
    stock = make(layers=3)
    stock.layers[1].norm_first = True
    stock.layers[2].activation = nn.functional.relu
    assert_same(converted(stock), stock, inputs(), REAL, src_key_padding_mask=RIGHT)
    stock.layers[1].self_attn.batch_first = False  # the layers disagree: nothing is shared
    stock.use_nested_tensor = False
    x = torch.randn(3, 3, WIDTH, dtype=torch.float64)
    mask = torch.tensor([[False, False, True]] * 3)
    assert_same(converted(stock), stock, x, src_key_padding_mask=mask)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return 3.0 * output, weights


def attention(kind=nn.MultiheadAttention, **options):
    return kind(WIDTH, HEADS, batch_first=True, dtype=torch.float64, **options)


def replaced(layer, name, value):
    setattr(layer, name, value)


class OwnTensor(torch.Tensor):
    """As quantised and sharded weights are."""


def own(parameter):
    return nn.Parameter(parameter.detach().as_subclass(OwnTensor))


UNUSUAL = {
    "is a OwnAttention": lambda layer: replaced(layer, "self_attn", attention(OwnAttention)),
    "add_bias_kv": lambda layer: replaced(layer, "self_attn", attention(add_bias_kv=True)),
    "add_zero_attn": lambda layer: replaced(layer, "self_attn", attention(add_zero_attn=True)),
    "out_proj is a Doubled": lambda layer: replaced(
        layer.self_attn, "out_proj", doubled(layer.self_attn.out_proj)
    ),
    "weight is a OwnTensor": lambda layer: replaced(
        layer.self_attn, "in_proj_weight", own(layer.self_attn.in_proj_weight)
    ),
    "its _ff_block was replaced": lambda layer: replaced(
        layer, "_ff_block", lambda x: layer.linear2(torch.sin(layer.linear1(x)))
    ),
}


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("reason", UNUSUAL)
def test_what_is_not_fused_runs_as_torch_trains_and_says_why(reason, norm_first):
    stock = make(norm_first=norm_first)
    model = copy.deepcopy(stock)
    for one in (stock, model):
        UNUSUAL[reason](one.layers[1])
    model.load_state_dict(stock.state_dict())
    bertfast.optimize(model)
    first, second = bertfast.report(model)
    assert first.reason is None and reason in second.reason
    assert reason in str(bertfast.report(model)) and reason in bertfast.report(model)._repr_html_()
    assert_same(model, stock, inputs(), src_key_padding_mask=RIGHT)


def test_keys_of_another_width_are_reported():
    layer = make(layers=1).layers[0]
    layer.self_attn = attention(kdim=8, vdim=8)
    assert "kdim" in bertfast.report(bertfast.optimize(layer))[0].reason


def test_the_output_projection_is_read_and_may_be_a_linear():
    stock = make(layers=1)
    out = stock.layers[0].self_attn.out_proj
    assert type(out) is NonDynamicallyQuantizableLinear
    other = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    other.load_state_dict(out.state_dict())
    model = converted(stock)
    model.layers[0].self_attn.out_proj = other
    assert bertfast.report(model)[0].reason is None
    assert_same(model, stock, inputs(), REAL, src_key_padding_mask=RIGHT)


def test_the_report_says_where_padding_is_kept():
    model = converted(make())
    assert bertfast.report(model).notes == []
    model.layers[1].register_forward_hook(lambda *_: None)
    (note,) = bertfast.report(model).notes
    assert note == (
        "TransformerEncoder keeps padding: "
        "in layer 1 a hook on a TransformerEncoderLayer sees its rows"
    )
    model.layers[0].norm1.register_forward_hook(lambda *_: None)
    assert "a hook on its LayerNorm has to be called" in str(bertfast.report(model))
    (note,) = bertfast.report(converted(make(), packed=False)).notes
    assert note == "TransformerEncoder keeps padding: packed=False"


def test_report_before_the_conversion():
    rows = bertfast.report(make())
    assert [row.status for row in rows] == ["not converted"] * 2


class DropPath(nn.Module):
    """One draw a row."""

    def forward(self, x):
        return x * (torch.rand(x.shape[0], 1, 1, dtype=x.dtype) < 0.5) if self.training else x


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_a_module_that_draws_once_a_row_sees_rows(norm_first):
    stock = make(norm_first=norm_first)
    stock.layers[1].dropout2 = DropPath()
    model = converted(stock)
    (note,) = bertfast.report(model).notes
    assert note == "TransformerEncoder keeps padding: in layer 1 a DropPath may act on rows"
    results = []
    for one in (stock.train(), model.train()):
        torch.manual_seed(3)
        results.append(one(inputs(), src_key_padding_mask=RIGHT)[~RIGHT])
    torch.testing.assert_close(*results)


def test_new_modules_of_the_converted_classes():
    """They run torch's code until they are optimized themselves."""
    model, x = converted(make()), inputs().float()
    layer = type(model.layers[0])(WIDTH, HEADS, INNER, batch_first=True).eval()
    new = type(model)(layer, 2).eval()
    want = nn.TransformerEncoder.forward(new, x, src_key_padding_mask=RIGHT)
    assert torch.equal(new(x, src_key_padding_mask=RIGHT), want)
    assert [row.reason for row in bertfast.report(new)] == ["not converted"] * 2
    model.layers[1] = layer.double()
    assert "TransformerEncoderLayer that is not converted" in str(bertfast.report(model))
    model(inputs(), src_key_padding_mask=RIGHT)
    bertfast.optimize(new, strict=True)
    torch.testing.assert_close(
        new(x, src_key_padding_mask=RIGHT)[~RIGHT], want[~RIGHT], rtol=0, atol=1e-5
    )
    assert type(bertfast.revert(new)) is nn.TransformerEncoder
