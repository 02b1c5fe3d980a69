"""Converted torch.nn.TransformerEncoders against torch's own training path, in float64: there a
wrong epsilon, activation or mask can't hide in rounding."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.torch_nn_models import (
    CAUSAL,
    FINITE,
    HEADS,
    INFINITE,
    LAYERS,
    LENGTH,
    LENGTHS,
    PADDINGS,
    RIGHT,
    ROWS,
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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import bertfast
from bertfast import ops, torch_nn
from bertfast.ops.dropout import draw_seed

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors"
)


def seen_shapes(monkeypatch):
    """The shapes that run_layer is called with."""
    shapes = []

    def record(parts, x, *args):
        shapes.append(tuple(x.shape))
        return run_layer(parts, x, *args)

    run_layer = torch_nn.run_layer
    monkeypatch.setattr(torch_nn, "run_layer", record)
    return shapes


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer", LAYERS)
def test_same_as_torchs_training_path(layer, padding, packed):
    stock, x, mask = make(**LAYERS[layer]), inputs(), PADDINGS[padding]
    real = None
    if packed and mask is not None and padding != "finite":
        real = ~(mask if mask.dtype == torch.bool else mask.isneginf())[..., None]
    if not stock.layers[0].self_attn.batch_first:
        x = x.transpose(0, 1)
        real = None if real is None else real.transpose(0, 1)
    model = converted(stock, packed=packed)
    assert_same(model, stock, x, real, src_key_padding_mask=mask)
    assert all(row.reason is None for row in bertfast.report(model))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "not-nested"])
@pytest.mark.parametrize("case", ["finite", "tanh"])
def test_right_where_torchs_fast_path_is_wrong(case, nested):
    activation = nn.GELU("tanh") if case == "tanh" else "gelu"
    stock, x = make(activation=activation, nested=nested).eval(), 3 * inputs()
    model, mask = converted(stock), -0.7 * RIGHT.double() if case == "finite" else None
    with torch.no_grad():
        fast, got = stock(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask)
        with training_path():
            want = stock(x, src_key_padding_mask=mask)
    assert_near(got, want)
    assert (fast - want).abs().max() > 1e-5  # else this shows nothing


@pytest.mark.parametrize("which", ["src_mask", "src_key_padding_mask"])
def test_a_query_without_keys_is_finite_as_in_training(which):
    """MultiheadAttention has a fast path of its own, and gives NaN there."""
    stock, x = make(layers=1).eval().layers[0], inputs()
    mask = CAUSAL.isneginf() if which == "src_mask" else RIGHT.clone()
    mask[1] = True
    model = converted(stock)
    model.linear1.register_forward_hook(lambda *_: None)  # for torch's code, with the padding too
    with torch.no_grad():
        with training_path():
            want = stock(x, **{which: mask})
        assert_near(model(x, **{which: mask}), want)
        assert stock(x, **{which: mask}).isnan().any()  # else this shows nothing


def test_a_padding_mask_that_is_learnt_gets_its_gradient():
    """Zeros and -Inf, but what it adds has a derivative."""
    stock, grads = make(), []
    model, x = converted(stock), inputs()
    for one in (stock, model):
        mask = INFINITE.clone().requires_grad_()
        one(x, src_key_padding_mask=mask)[~RIGHT].pow(3).sum().backward()
        grads.append(mask.grad)
    assert grads[0].ne(0).any()
    assert_near(grads[1], grads[0])


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("padding", [None, RIGHT, INFINITE], ids=["none", "bool", "float"])
@pytest.mark.parametrize(
    "mask, is_causal",
    [
        (CAUSAL, None),
        (CAUSAL, True),
        (CAUSAL.isneginf(), False),
        (torch.linspace(-2, 2, LENGTH**2, dtype=torch.float64).view(LENGTH, LENGTH), None),
        (CAUSAL.expand(ROWS * HEADS, -1, -1), None),
    ],
    ids=["causal", "hint", "bool", "finite", "per-head"],
)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_source_masks(mask, is_causal, padding, norm_first):
    stock = make(norm_first=norm_first)
    kwargs = dict(mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
    if is_causal:  # torch then ignores the padding in its own way, if the hint comes with padding
        kwargs["src_key_padding_mask"] = None
    assert_same(converted(stock), stock, inputs(), **kwargs)


def test_a_causal_hint_without_a_mask_raises_as_in_training():
    stock = make()
    for model in (stock, converted(stock)):
        with pytest.raises(RuntimeError, match="mask"):
            model(inputs(), is_causal=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="src_mask must be given"):
        converted(stock).eval()(inputs(), is_causal=True)


@pytest.mark.parametrize("mask", [RIGHT[:, :-1], RIGHT[0], RIGHT.int()], ids=["short", "1d", "int"])
def test_torch_refuses_a_wrong_mask(mask):
    stock = make()
    with pytest.raises(Exception) as theirs:
        stock(inputs(), src_key_padding_mask=mask)
    with pytest.raises(type(theirs.value)) as ours:
        converted(stock)(inputs(), src_key_padding_mask=mask)
    assert isinstance(ours.value, (AssertionError, RuntimeError))


# ---- packed


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layer", ["post", "pre", "length-first"])
def test_padding_is_taken_out_once_and_comes_back_as_zeros(layer, training, monkeypatch):
    model = converted(make(norm=False, **LAYERS[layer]).train(training))
    shapes = seen_shapes(monkeypatch)
    x = inputs()
    if layer == "length-first":
        x = x.transpose(0, 1)
    y = model(x, src_key_padding_mask=RIGHT)
    assert shapes == [(1, LENGTHS.sum(), WIDTH)] * 2
    assert y.is_contiguous()
    rows = y.transpose(0, 1) if layer == "length-first" else y
    assert rows[RIGHT].eq(0).all() and rows[~RIGHT].ne(0).any(-1).all()


def test_the_final_norm_sees_the_zeros_as_in_torchs_eval():
    stock = make().eval()
    with torch.no_grad():
        want = stock(inputs(), src_key_padding_mask=RIGHT)[RIGHT]
        got = converted(stock)(inputs(), src_key_padding_mask=RIGHT)[RIGHT]
    assert_near(want, stock.norm.bias.expand_as(want))
    assert_near(got, want)


@pytest.mark.parametrize("padding", ["none", "left", "all-of-a-row", "finite"])
def test_not_packed(padding, monkeypatch):
    shapes = seen_shapes(monkeypatch)
    converted(make())(inputs(), src_key_padding_mask=PADDINGS[padding])
    assert shapes == ([] if padding == "finite" else [(ROWS, LENGTH, WIDTH)] * 2)


def test_not_packed_without_leave_or_where_somebody_looks(monkeypatch):
    shapes = seen_shapes(monkeypatch)
    model = converted(make(), packed=False)
    model(inputs(), src_key_padding_mask=RIGHT)
    bertfast.optimize(model)
    hook = model.layers[1].register_forward_hook(lambda *_: None)
    model(inputs(), src_key_padding_mask=RIGHT)
    hook.remove()
    model.layers[0] = wrapper = checkpoint_wrapper(model.layers[0])
    for hooked in (wrapper, wrapper._checkpoint_wrapped_module):
        hook = hooked.register_forward_hook(lambda *_: None)
        model(inputs(), src_key_padding_mask=RIGHT)
        hook.remove()
    assert shapes == [(ROWS, LENGTH, WIDTH)] * 8


# ---- other inputs


@pytest.mark.parametrize("padding", [None, RIGHT[2], FINITE[2]], ids=["none", "bool", "finite"])
@pytest.mark.parametrize("layer", ["post", "length-first", "pre"])
def test_one_sequence_without_a_batch(layer, padding):
    stock = make(**LAYERS[layer])
    real = None
    if padding is not None and padding.dtype == torch.bool:
        real = ~padding[:, None]
    assert_same(converted(stock), stock, inputs()[0], real, src_key_padding_mask=padding)


@pytest.mark.parametrize("alone", [False, True], ids=["encoder", "layer"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "not-nested"])
@pytest.mark.parametrize("layer", ["post", "pre", "tanh"])
def test_nested_input(layer, nested, alone):
    stock, x = make(nested=nested, **LAYERS[layer]), inputs()
    model = converted(stock)
    if alone:
        stock, model = stock.layers[0], model.layers[0]
    with training_path():
        want = outputs_and_grads(stock, x, ~RIGHT[..., None], src_key_padding_mask=RIGHT)
    x.requires_grad_()
    y = model(torch.nested.as_nested_tensor([r[:n] for r, n in zip(x, LENGTHS, strict=True)]))
    assert y.is_nested and [len(part) for part in y.unbind()] == LENGTHS.tolist()
    y = torch.nested.to_padded_tensor(y, 0.0, (ROWS, LENGTH, WIDTH))
    assert_near(y.detach(), want["output"])
    y.backward(torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view(y.shape))
    assert_near(x.grad, want["x"])
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, want[name])


@pytest.mark.parametrize("alone", [False, True], ids=["encoder", "layer"])
@pytest.mark.parametrize("why", ["mask", "length-first", "empty"])
def test_nested_input_that_torch_refuses(why, alone):
    stock = make(batch_first=why != "length-first").eval()
    x = torch.nested.nested_tensor([] if why == "empty" else [inputs()[0]])
    mask = RIGHT[:1] if why == "mask" else None
    for model in (stock, converted(stock)):
        model = model.layers[0] if alone else model
        with torch.no_grad(), pytest.raises((AssertionError, RuntimeError)):
            model(x, src_key_padding_mask=mask)


@pytest.mark.parametrize("shape", [(0, LENGTH), (ROWS, 0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer", ["post", "pre"])
def test_empty_batch(layer, masked, shape):
    model = converted(make(**LAYERS[layer]))
    x = torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
    y = model(x, src_key_padding_mask=torch.zeros(shape, dtype=torch.bool) if masked else None)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.layers.parameters())


def test_autocast_gives_torchs_dtypes():
    for layer in ("post", "pre", "relu"):
        stock = make(dtype=torch.float32, **LAYERS[layer]).eval()
        model, x = converted(stock), inputs(torch.float32)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            got = model(x, src_key_padding_mask=RIGHT)
            with training_path():
                want = stock(x, src_key_padding_mask=RIGHT)
        assert got.dtype == want.dtype
        # Two layers of some ten roundings to bfloat16, in a random walk. One is 2^-9 of a value, as
        # root mean square, so sqrt(20) of them; between two runs sqrt(2) times that. Measured: 0.51
        # of one walk at most over 12 seeds on an AMD EPYC, as most roundings are less than 2^-9.
        got, want = got[~RIGHT].float(), want[~RIGHT].float()
        walk = 2**-9 * math.sqrt(20) * want.square().mean().sqrt().item()
        apart = math.sqrt(2) * walk
        assert (got - want).square().mean().sqrt().item() <= apart
        # The most likely largest of n normal ones, in standard deviations (Gumbel's location).
        log = math.log(2 * got.numel())
        times = math.sqrt(2 * log) - math.log(4 * math.pi * log) / (2 * math.sqrt(2 * log))
        assert (got - want).abs().max().item() <= apart * times


class Seen(nn.Module):
    """Stands for a dropout, which is called, and keeps the dtype that goes through it."""

    def forward(self, x):
        self.dtype = x.dtype
        return x


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_keeps_the_hidden_layer_in_16_bits(backend, need):
    if backend == "triton":
        need("attention_qkv", ("triton", "cpu"))
    model = converted(make(layers=1, dtype=torch.float32), backend=backend)
    model.layers[0].dropout = seen = Seen()
    with torch.autocast("cpu", torch.float16):
        model(inputs(torch.float32))
    assert seen.dtype == torch.float16


# ---- dropout

DROPOUTS = ("self_attn.dropout", "dropout", "dropout1", "dropout2")


def set_dropout(model, **rates):
    for layer in model.layers:
        layer.self_attn.dropout = rates.get("attention", 0.0)
        for name in DROPOUTS[1:]:
            getattr(layer, name).p = rates.get(name, 0.0)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("names", [("dropout",), ("dropout1",), ("dropout2",), ("attention",)])
def test_each_dropout_drops_what_torchs_does(names, norm_first):
    """With p = 1 there is no chance in it."""
    stock = make(norm_first=norm_first)
    set_dropout(stock, **dict.fromkeys(names, 1.0))
    model, x = converted(stock), inputs()
    want, got = outputs_and_grads(stock, x), outputs_and_grads(model, x)
    for name, value in want.items():
        assert_near(got[name], value)
    off = [getattr(m, n) for m in model.layers for n in ("dropout", "dropout1", "dropout2")]
    for module in (*off, *(layer.self_attn for layer in model.layers)):
        module.eval()  # each has a mode of its own
    set_dropout(stock)
    assert_near(model(x).detach(), stock(x).detach())
    assert (want["output"] - stock(x)).abs().max() > 1e-2


def test_the_masks_are_those_of_the_seed():
    """A post-norm layer written out, with the masks that `dropout_keep_mask` gives. A backend is
    asked for, as "auto" may leave masks to torch on a CPU."""
    stock = make(layers=1, norm=False)
    set_dropout(stock, attention=0.4, dropout1=0.3, dropout2=0.2)
    layer, x = stock.layers[0], inputs()
    torch.manual_seed(5)
    got = converted(stock, backend="torch")(x)

    torch.manual_seed(5)
    seed = draw_seed(x.device)

    def dropped(value, p, site, kind="row"):
        keep = ops.dropout_keep_mask(seed, site, value.shape, p, kind)
        return torch.where(keep, value / (1 - round(65536 * p) / 65536), 0.0)

    attention = layer.self_attn
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
    context = (dropped(weights, 0.4, 0, "attention") @ v).transpose(1, 2).flatten(2)
    y = layer.norm1(x + dropped(attention.out_proj(context), 0.3, 1))
    want = layer.norm2(y + dropped(layer.linear2(F.gelu(layer.linear1(y))), 0.2, 2))
    assert_near(got.detach(), want.detach())


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_dropout_follows_torchs_generator(norm_first):
    model, x = converted(make(dropout=0.3, norm_first=norm_first)), inputs()
    torch.manual_seed(1)
    first, other = model(x), model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first) and not torch.equal(first, other)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_packed_and_padded_drop_the_same():
    """By a backend that was asked for: otherwise the masks on a CPU are torch's."""
    model = make()
    set_dropout(model, attention=0.3, dropout1=0.3, dropout2=0.3)
    outs = []
    for packed in (True, False):
        torch.manual_seed(2)
        run = converted(model, packed=packed, backend="torch")
        outs.append(run(inputs_of_seed(), src_key_padding_mask=RIGHT))
    assert_near(outs[0][~RIGHT].detach(), outs[1][~RIGHT].detach())


def inputs_of_seed():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64, generator=generator)


class Checkpointed(nn.Module):
    def __init__(self, encoder, reentrant):
        super().__init__()
        self.layers, self.reentrant = encoder.layers, reentrant

    def forward(self, x, src_key_padding_mask):
        for layer in self.layers:
            x = checkpoint(layer, x, None, src_key_padding_mask, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("form", ["reentrant", "not-reentrant", "wrapped"])
def test_checkpointed_layers_drop_the_same_again(form, norm_first, monkeypatch):
    model, x = converted(make(dropout=0.3, norm=False, norm_first=norm_first)), inputs()
    if form == "wrapped":
        again = copy.deepcopy(model)
        again.layers = nn.ModuleList(map(checkpoint_wrapper, again.layers))
    else:
        again = Checkpointed(model, form == "reentrant")
        model.layers[0].register_forward_hook(lambda *_: None)  # padded, as a layer alone is
    torch.manual_seed(3)
    want = outputs_and_grads(model, x, src_key_padding_mask=RIGHT)
    shapes = seen_shapes(monkeypatch)
    torch.manual_seed(3)
    got = outputs_and_grads(again, x, src_key_padding_mask=RIGHT)
    assert len(shapes) == 4  # each layer ran twice
    assert form != "wrapped" or set(shapes) == {(1, LENGTHS.sum().item(), WIDTH)}
    for name, value in got.items():
        name = name.replace("._checkpoint_wrapped_module", "")
        assert torch.equal(value, want[name]), name


# ---- compilers and kernels


@pytest.mark.parametrize(
    "layer, padding, training",
    [
        ("post", "right", True),
        ("post", "finite", False),
        ("pre-length-first", "right", False),
    ],
)
def test_compiles_into_one_graph(layer, padding, training):
    torch._dynamo.reset()
    stock = make(layers=1, **LAYERS[layer]).train(training)
    model, x = converted(stock), inputs()
    x = x if layer == "post" else x.transpose(0, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with training_path():
        want = outputs_and_grads(stock, x, src_key_padding_mask=PADDINGS[padding])
    got = outputs_and_grads(compiled, x, src_key_padding_mask=PADDINGS[padding])
    for name, value in want.items():
        name = name if name in ("output", "x") else f"_orig_mod.{name}"
        assert_near(got[name], value)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_exports_with_any_batch_and_length(norm_first):
    stock = make(norm_first=norm_first).eval()
    sizes = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("length", min=2)}
    names = {"src": sizes, "src_key_padding_mask": sizes}
    program = torch.export.export(
        converted(stock), (inputs(),), {"src_key_padding_mask": RIGHT}, dynamic_shapes=names
    )
    x, mask = torch.randn(5, 9, WIDTH, dtype=torch.float64), torch.arange(9).expand(5, 9) > 5
    with training_path(), torch.no_grad():
        want = stock(x, src_key_padding_mask=mask)
    assert_near(program.module()(x, src_key_padding_mask=mask), want)


@pytest.mark.parametrize("layer", ["post", "pre"])
def test_kernels(layer, target, need, finest):
    """The same layers on Triton and CUDA: packed, padded, gradients."""
    for op in ("attention_qkv", "layer_norm", "bias_gelu"):
        need(op, target)
    backend, device = target
    dtype = finest("attention_qkv", target)
    stock = make(layers=1, dtype=dtype, **LAYERS[layer])
    x, real = inputs(dtype), ~RIGHT[..., None]
    with training_path():
        want = outputs_and_grads(stock, x, real, src_key_padding_mask=RIGHT)
    for packed in (True, False):
        model = converted(stock, backend=backend, packed=packed).to(device)
        where = {"src_key_padding_mask": RIGHT.to(device)}
        got = outputs_and_grads(model, x.to(device), real.to(device), **where)
        for name, value in want.items():
            assert_near(got[name].cpu(), value)


def test_an_explicit_backend_that_cannot_run_raises():
    model = converted(make(), backend="triton")
    with pytest.raises(ValueError, match="float64"):
        model(inputs())
