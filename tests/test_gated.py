"""gated on every backend: the case table against float64, and properties."""

import math

import pytest
import torch
from support.guard import run_guarded

from bertfast.ops import gated
from bertfast.ops.gated.limits import ACTIVATIONS
from bertfast.ops.gated.reference import act
from bertfast.testing import UNIT_ROUNDOFF, compare, hold_to_budget, worst
from bertfast.testing import gated as table
from bertfast.testing.gated import Case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
halves = pytest.mark.parametrize("activated", ["first", "second"])


@dtypes
def test_kernels_stay_within_the_error_budget(dtype, target, need):
    need("gated", target)
    # The interpreter takes a tenth of a second for a case: of the other dtypes the hostile ones.
    quick = target == ("triton", "cpu") and dtype != torch.float16
    for case in table.quick_cases() if quick else table.cases():
        inputs = table.make_inputs(case, dtype)
        try:
            hold_to_budget(table, inputs, run_guarded(table.run, inputs, target))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_many_rows_take_every_step_of_a_program(target, need):
    need("gated", target)
    inputs = table.make_inputs(Case((600, 40), bias=True, activation="silu"), torch.bfloat16)
    hold_to_budget(table, inputs, run_guarded(table.run, inputs, target))


@pytest.mark.triton
@pytest.mark.parametrize("bias", [True, False])
def test_triton_programs_that_take_the_steps_of_a_large_tensor(monkeypatch, bias):
    triton = pytest.importorskip("bertfast.ops.gated.triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = triton.backward_config(40, 2, 2**24, bias)
    assert config.steps > triton.backward_config(40, 2, 600, bias).steps
    monkeypatch.setattr(triton, "backward_config", lambda *case: config)
    inputs = table.make_inputs(Case((600, 40), bias), torch.float16)
    hold_to_budget(table, inputs, run_guarded(table.run, inputs, ("triton", device)))


@pytest.mark.parametrize("case", table.quick_cases(), ids=str)
def test_torch_backend_is_stock_torch_and_within_the_budget(case):
    inputs = table.make_inputs(case, torch.float32)
    stock = table.plain_torch(inputs)
    for name, value in table.run(inputs, "torch").items():
        assert torch.equal(value, stock[name]), name
    for dtype in DTYPES:
        inputs = table.make_inputs(case, dtype)
        hold_to_budget(table, inputs, table.run(inputs, "torch"))


def _sum_in_fp16(terms):
    total = torch.zeros(terms.shape[-1], dtype=torch.float16)
    for row in terms:
        total += row.half()
    return total


# Where y is of the size of 1, tanh's error hides behind float16's rounding; in the tail not.
FAULTS = [
    ("tail", dict(activation="gelu_tanh")),
    ("normal", dict(activation="silu")),
    ("normal", dict(column_sum=_sum_in_fp16)),
    ("normal", dict(store=lambda a: a.bfloat16().float())),
]


@pytest.mark.parametrize(("values", "fault"), FAULTS, ids=lambda value: str([*value])[:20])
def test_budget_catches_a_planted_precision_fault(values, fault):
    inputs = table.make_inputs(Case((301, 192), bias=True, values=values), torch.float16)
    good, bad = table.rounding_model(inputs), table.rounding_model(inputs, **fault)
    oracle = table.oracle(inputs)
    assert worst(compare(good, oracle, good, table.scales(inputs))).ok
    assert not worst(compare(bad, oracle, good, table.scales(inputs))).ok


def test_budget_catches_a_sigmoid_made_of_16_bit_exponentials():
    """SiLU's scales, which allow float32's tail some more, allow no more than that."""
    inputs = table.make_inputs(Case((65, 40), activation="silu", values="tail"), torch.float32)
    good = table.rounding_model(inputs)
    bad = dict(good, y=good["y"] * (1 + 2.0**-19))
    oracle, scales = table.oracle(inputs), table.scales(inputs)
    assert worst(compare(good, oracle, good, scales)).ok
    assert not worst(compare(bad, oracle, good, scales)).ok


# The activations, every float16 value of u.


def _every_float16():
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return values[values.isfinite()]


def _ulp(y):
    """The distance of neighbouring float16 values at |y|."""
    return 2.0 ** (y.abs().clamp(min=2.0**-14).log2().floor() - 10)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_every_float16_value_is_within_0_6_ulp_forward_and_backward(activation, target, need):
    need("gated", target)
    u = _every_float16()
    x = torch.cat([u, torch.ones_like(u)]).to(target[1]).requires_grad_()
    y = gated(x, activation=activation, backend=target[0])
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    leaf = u.double().requires_grad_()
    exact = act(leaf, activation)
    (slope,) = torch.autograd.grad(exact.sum(), leaf)
    exact, tail = exact.detach(), torch.zeros_like(leaf)
    if activation == "gelu":  # without cancellation in the tail
        v = leaf.detach()
        exact = v * torch.special.erfc(-v / math.sqrt(2)) / 2
        tail = torch.special.erfc(v.abs() / math.sqrt(2)) / 2
    du, dv = dx.cpu().double().chunk(2)
    for actual in (y.detach().cpu().double(), dv):
        assert ((actual - exact).abs() / _ulp(exact)).max() <= 0.6
    # The polynomial is off by 0.055 units in the last place of z * tail, as fit.py says: of the
    # tail itself, of which the slope is made, by at most 0.055 * 2^-10. Where the slope is small
    # the rest of the error is absolute.
    allowed = 0.6 * _ulp(slope.abs().clamp(min=1e-3)) + 0.055 * 2.0**-10 * tail
    assert ((du - slope).abs() / allowed).max() <= 1


@dtypes
@activations
def test_special_values(target, need, dtype, activation):
    """The limits at infinity, also where torch has NaN; NaN stays NaN; beyond the tail nothing."""
    need("gated", target)
    inf, nan, big = math.inf, math.nan, 6e4
    u = torch.tensor([inf, -inf, nan, 0.0, -0.0, big, -big, -200.0], dtype=dtype)
    x = torch.cat([u, torch.ones_like(u)]).to(target[1]).requires_grad_()
    y = gated(x, activation=activation, backend=target[0])
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    du, dv = dx.cpu().chunk(2)
    expected = torch.tensor([inf, 0, nan, 0, 0, big, 0, 0], dtype=dtype)
    slope = torch.tensor([1, 0, nan, 0.5, 0.5, 1, 0, 0], dtype=dtype)
    for actual in (y.detach().cpu(), dv):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(du, slope, rtol=0, atol=UNIT_ROUNDOFF[dtype], equal_nan=True)


def test_a_nan_or_inf_stays_in_its_place(target, need):
    need("gated", target)
    inputs = table.make_inputs(Case((45, 80), bias=True), torch.float16)
    clean = table.run(inputs, *target)
    spoilt = dict(inputs, x=inputs["x"].clone())
    spoilt["x"][7, 3], spoilt["x"][44, 159] = torch.nan, torch.nan  # of u, and of v
    dirty = table.run(spoilt, *target)
    assert (clean["y"] != dirty["y"]).nonzero().tolist() == [[7, 3], [44, 79]]
    assert (clean["dx"] != dirty["dx"]).nonzero().tolist() == [[7, 3], [7, 83], [44, 79]]
    assert (clean["dbias"] != dirty["dbias"]).nonzero().flatten().tolist() == [3, 79, 83]


# Properties.


@activations
@halves
def test_the_halves_in_either_order_give_the_same_bits(target, need, activation, activated):
    """And as a product by hand of the activation, which rounds once more."""
    need("gated", target)
    u, v, dy = (torch.randn(9, 40, device=target[1]).half() for _ in "uvy")
    results = []
    for order in ("first", activated):
        parts = (u, v) if order == "first" else (v, u)
        x = torch.cat(parts, -1).requires_grad_()
        y = gated(x, activation=activation, activated=order, backend=target[0])
        dx = torch.autograd.grad(y, x, dy)[0].chunk(2, -1)
        results.append((y, *(dx if order == "first" else reversed(dx))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    by_hand = act(u.float(), activation) * v.float()
    assert (results[0][0].float() - by_hand).abs().max() <= 2.0**-11 * by_hand.abs().max()


def test_same_bits_every_run_and_with_and_without_gradients(target, need):
    need("gated", target)
    inputs = table.make_inputs(Case((21, 384), bias=True), torch.float16)
    first, second = table.run(inputs, *target), table.run(inputs, *target)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    with torch.no_grad():
        y = gated(*(inputs[name].to(target[1]) for name in table.NAMES), backend=target[0])
    assert torch.equal(y, first["y"])


@pytest.mark.parametrize("wanted", [("x",), ("bias",)])
def test_any_subset_of_gradients(target, need, wanted):
    need("gated", target)
    inputs = table.make_inputs(Case((19, 384), bias=True), torch.float32)
    everything = table.run(inputs, *target)
    leaves = {name: inputs[name].to(target[1]).clone() for name in table.NAMES}
    for name in wanted:
        leaves[name].requires_grad_()
    y = gated(**leaves, backend=target[0])
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], inputs["dy"].to(target[1]))
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, everything[f"d{name}"]), name


def test_only_the_inputs_are_saved_and_one_buffer_is_made_of_each_result(target, need):
    """No copy of a half: forward allocates y, backward dx."""
    need("gated", target)
    rows = torch.randn(3, 200, device=target[1])
    x = rows[:, 8:136].detach().requires_grad_()  # in place in wider rows
    saved, made, real = [], [], torch.empty

    def empty(*args, **kwargs):
        made.append(real(*args, **kwargs))
        return made[-1]

    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(torch, "empty", empty)
        y = gated(x, backend=target[0])
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]
    assert [tensor.numel() for tensor in made if tensor.numel()] == [3 * 64, 3 * 128]
    assert dx.data_ptr() == made[1].data_ptr()


def test_the_same_tensor_given_twice(target, need):
    need("gated", target)
    x = torch.randn(40, device=target[1], requires_grad=True)
    dy = torch.randn(20, device=target[1])
    (dx,) = torch.autograd.grad(gated(x, x, backend=target[0]), x, dy)
    (stock,) = torch.autograd.grad(gated(2 * x, backend="torch"), x, dy)
    assert (dx - stock).abs().max() < 1e-5


def test_a_gradient_that_repeats_one_value(target, need):
    """The gradient that sum().backward() hands down has strides of zero."""
    need("gated", target)
    x = torch.randn(3, 40, device=target[1], requires_grad=True)
    gated(x, backend=target[0]).sum().backward()
    (stock,) = torch.autograd.grad(gated(x, backend="torch").sum(), x)
    assert (x.grad - stock).abs().max() < 1e-5


def test_offsets_beyond_32_bits(target, need):
    need("gated", target)
    gap = 2**30  # the third row starts at element 2^31; what lies between is never touched
    x = torch.empty(2 * gap + 64, dtype=torch.float16, device=target[1])
    x = x.as_strided((3, 64), (gap, 1))
    values = torch.randn(3, 64, device=target[1], dtype=torch.float16)
    x.copy_(values)
    results = []
    for tensor in (x, values):
        leaf = tensor.detach().requires_grad_()
        y = gated(leaf, backend=target[0])
        results.append((y, *torch.autograd.grad(y, leaf, values[:, :32])))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)


@pytest.mark.parametrize("width", [256, 36])
def test_tensors_that_start_anywhere(target, need, width):
    """One element into their memory, or a half that is no whole number of 16 bytes: then accesses
    of 16 bytes are not possible."""
    need("gated", target)

    def off(*shape):
        return torch.randn(math.prod(shape) + 1, device=target[1]).half()[1:].view(shape)

    tensors, dy, results = [off(5, 3, 2 * width), off(2 * width)], off(5, 3, width), []
    for copy in (torch.Tensor.detach, torch.Tensor.clone):
        leaves = [copy(tensor).requires_grad_() for tensor in tensors]
        y = gated(*leaves, backend=target[0])
        results.append((y, *torch.autograd.grad(y, leaves, copy(dy))))
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)


@activations
@halves
def test_reference_gradients_in_float64(activation, activated):
    x, bias = torch.randn(3, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()

    def f(x, bias):
        return gated(x, bias, activation=activation, activated=activated)

    assert torch.autograd.gradcheck(f, (x, bias))


@pytest.mark.parametrize(
    ("x_dtype", "bias_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "target"])
def test_under_autocast_the_bias_is_cast(target, need, x_dtype, bias_dtype, backend):
    need("gated", target)
    name, device = target
    name = "torch" if backend == "torch" else name
    x = torch.randn(4, 96, device=device).to(x_dtype).requires_grad_()
    bias = None
    if bias_dtype is not None:
        bias = torch.randn(96, device=device).to(bias_dtype).requires_grad_()
    leaves = [leaf for leaf in (x, bias) if leaf is not None]
    with torch.autocast(device, dtype=torch.bfloat16):
        y = gated(*leaves, backend=name)
    same = [leaf.detach().to(x_dtype).requires_grad_() for leaf in leaves]
    stock = gated(*same, backend=name)
    assert y.dtype == x_dtype and torch.equal(y, stock)
    dy = torch.randn_like(stock)
    ours, theirs = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(stock, same, dy)
    for leaf, mine, other in zip(leaves, ours, theirs, strict=True):
        assert mine.dtype == leaf.dtype and torch.equal(mine, other.to(leaf.dtype))


def test_it_is_the_feed_forward_part_of_the_families_of_transformers():
    """Which half is activated, by transformers' own modules."""
    pytest.importorskip("transformers")
    from transformers.models.gte.modeling_gte import GteConfig, GteMLP
    from transformers.models.modernbert.modeling_modernbert import ModernBertConfig, ModernBertMLP
    from transformers.models.nomic_bert.modeling_nomic_bert import NomicBertConfig, NomicBertMLP

    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    x = torch.randn(5, 16)
    mlp = ModernBertMLP(ModernBertConfig(**sizes)).eval()
    y = gated(mlp.Wi(x), activation=mlp.config.hidden_activation)
    torch.testing.assert_close(mlp.Wo(y), mlp(x))
    for kind, config in ((GteMLP, GteConfig), (NomicBertMLP, NomicBertConfig)):
        mlp = kind(config(**sizes)).eval()
        up, gate = mlp.up_proj(x), mlp.gate_proj(x)
        activation = mlp.config.hidden_act
        y = gated(torch.cat([gate, up], -1), activation=activation)
        torch.testing.assert_close(mlp.down_proj(y), mlp(x))
        own = gated(torch.cat([up, gate], -1), activation=activation, activated="second")
        torch.testing.assert_close(own, y)


# What only the host build can show.


@pytest.mark.host
@pytest.mark.parametrize("shape", [(70, 1152), (9, 33), (3, 5, 24)], ids=str)
def test_same_bits_in_every_scheduling_order(host_runtime, shape):
    results = []
    for order, seed in (("depth-first", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        host_runtime.set_schedule(order, seed)
        inputs = table.make_inputs(Case(shape, bias=True), torch.float16)
        results.append(table.run(inputs, "cuda"))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.host
@dtypes
@pytest.mark.parametrize("seed", range(3))
def test_budget_holds_when_approximations_are_off_by_their_documented_error(
    host_runtime, dtype, seed
):
    host_runtime.set_perturb(True, seed)
    for case in table.quick_cases():
        inputs = table.make_inputs(case, dtype)
        hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@pytest.mark.host
def test_chains_as_long_as_they_get(host_runtime, monkeypatch):
    rows, width = 1003, 256
    inputs = table.make_inputs(Case((rows, width), bias=True), torch.float32)
    longest = 32  # kLongestChain in csrc/bindings/call.cpp
    chains = -(-rows // longest)
    shape = (chains, 2 * width)
    monkeypatch.setattr(host_runtime, "gated_partial_shape", lambda dy: shape)
    hold_to_budget(table, inputs, table.run(inputs, "cuda"))


@pytest.mark.host
def test_what_the_host_module_refuses(host_runtime):
    x, y = torch.zeros(3, 16), torch.zeros(3, 8)
    with pytest.raises(ValueError, match="the activation must be 0, 1 or 2"):
        host_runtime.gated_forward(x, None, 3, False, y)
    with pytest.raises(ValueError, match="dbias needs a bias"):
        host_runtime.gated_backward(y, x, None, 0, False, x, x[0], torch.zeros(2, 16))
    with pytest.raises(ValueError, match="there must be elements"):
        host_runtime.gated_forward(x[:0], None, 0, False, y[:0])


def test_case_names_are_unique():
    for cases in (table.cases(), table.quick_cases()):
        assert len({str(case) for case in cases}) == len(cases)
