"""linear_log1p_max: the case table against float64, and beside the same of torch's functions."""

import pytest
import torch
import torch.nn.functional as F

import bertfast
from bertfast.ops import linear_log1p_max
from bertfast.ops.log1p_max import chunks
from bertfast.testing import compare, hold_to_budget, worst
from bertfast.testing import linear_log1p_max as table
from bertfast.testing.linear_log1p_max import Case

OP = "linear_log1p_max"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


@dtypes
@pytest.mark.parametrize("case", table.cases(), ids=str)
def test_it_stays_within_the_error_budget(case, dtype, monkeypatch):
    """In chunks of 64 words."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 0)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, "torch"))


@pytest.mark.parametrize("fault", ["rounded logits", "fp16 sums"])
def test_budget_catches_a_planted_fault(fault):
    inputs = table.make_inputs(Case((9, 3, 14), 32, 400), torch.float16)

    def in_fp16(spread, weight):
        total = torch.zeros(*spread.shape[:2], weight.shape[1], dtype=torch.float16)
        for word, row in enumerate(weight):
            total += (spread[..., word, None] * row).half()
        return total

    planted = {
        "rounded logits": dict(logits=lambda t: t.bfloat16().float()),
        "fp16 sums": dict(token_sum=in_fp16),
    }
    good, oracle = table.rounding_model(inputs), table.oracle(inputs)
    bad, scales = table.rounding_model(inputs, **planted[fault]), table.scales(inputs)
    assert worst(compare(good, oracle, good, scales)).ok
    assert not worst(compare(bad, oracle, good, scales)).ok


def leaves(*shape, width=8, vocabulary=30, dtype=torch.float64):
    shapes = (*shape, width), (vocabulary, width), (vocabulary,)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def stock(x, weight, bias, mask):
    """As sentence-transformers' SpladePooling."""
    logits = F.linear(x, weight, bias)
    return (torch.log1p(torch.relu(logits)) * mask[..., None]).max(1).values


def gradients(y, given):
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, given, torch.randn_like(y))]


def equal(ones, others, exactly=True):
    for one, other in zip(ones, others, strict=True):
        if exactly:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other)


def test_it_is_splade():
    x, weight, bias = leaves(3, 7)
    mask = torch.arange(7) < torch.tensor([7, 2, 5])[:, None]
    mine = linear_log1p_max(x, weight, bias, key_mask=mask)
    given = x, weight, bias
    equal(gradients(mine, given), gradients(stock(*given, mask), given), exactly=False)


def test_of_equal_products_the_first_has_the_gradient():
    """Small integers; so does the reference that is traced, padded and packed."""
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0], [3.0, 1.0], [2.0, 3.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [1.0, 2.0], [-1.0, -1.0]])
    bounds = torch.tensor([0, 3, 4], dtype=torch.int32)

    def packed(x):
        return linear_log1p_max(x, weight, cu_seqlens=bounds, max_seqlen=3)

    # Words 0 and 1 of the first three rows are largest in row 1; 5 = 1 + 4 = 3 + 2 ties row 0.
    y = packed(x)
    assert torch.equal(y, torch.log1p(torch.tensor([[3.0, 5.0, 0.0], [2.0, 8.0, 0.0]])))
    (dx,) = torch.autograd.grad(y.sum(), x)
    first = weight[1] / 6, weight[0] / 4, torch.zeros(2), weight[0] / 3 + weight[1] / 9
    torch.testing.assert_close(dx, torch.stack(first))
    torch.testing.assert_close(torch.func.grad(lambda x: packed(x).sum())(x.detach()), dx)


@pytest.mark.parametrize("backend", ["torch", "traced"])
def test_what_is_masked_counts_for_nothing(backend):
    """A NaN or an infinity too; a sequence without tokens gives zeros and gets no gradient."""
    x, weight, bias = leaves(3, 5)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]]).bool()
    with torch.no_grad():
        x[~mask] = torch.tensor([torch.nan, torch.inf]).double().repeat(5)[:10, None]
    given = x, weight, bias

    def call(x, weight, bias, **options):
        if backend == "traced":
            weight = torch._neg_view(-weight)
        return linear_log1p_max(x, weight, bias, **options)

    found = gradients(call(*given, key_mask=mask), given)
    assert all(tensor.isfinite().all() for tensor in found)
    assert not found[0][1].any() and not found[1][~mask].any()
    bounds = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    rows = x[mask].detach().requires_grad_()
    packed = call(rows, weight, bias, cu_seqlens=bounds, max_seqlen=3)
    y, dx, *rest = gradients(packed, (rows, weight, bias))
    equal(found, [y, torch.zeros_like(x).masked_scatter(mask[..., None], dx), *rest], False)


def test_a_nan_that_counts_is_seen():
    x, weight, bias = leaves(2, 3)
    with torch.no_grad():
        x[1, 1, 0] = torch.nan
    y, dx, *_ = gradients(linear_log1p_max(x, weight, bias), (x, weight, bias))
    assert y[0].isfinite().all() and y[1].isnan().all()
    assert dx[0].isfinite().all() and dx[1].isnan().any()


@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_the_same_bits_in_chunks_and_each_run(layout, monkeypatch):
    inputs = table.make_inputs(Case((9, 0, 4, 4), 16, 200, layout), torch.bfloat16)
    first = table.run(inputs, "torch")
    equal(first.values(), table.run(inputs, "torch").values())
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 0)
    hold_to_budget(table, inputs, table.run(inputs, "torch"))


def test_lengths_that_the_host_cannot_read(monkeypatch):
    """As on a GPU: gathered, with all entries of the gradients."""
    inputs = table.make_inputs(Case((9, 0, 4, 4), 16, 70, "packed"), torch.float32)
    for module in ("reference_top", "registered"):
        monkeypatch.setattr(f"bertfast.ops.log1p_max.{module}.on_host", lambda tensor: False)
    hold_to_budget(table, inputs, table.run(inputs, "torch"))


def test_frozen_parts_and_no_gradients():
    given = leaves(2, 5)
    y = linear_log1p_max(*given)
    whole = gradients(y, given)
    with torch.no_grad():
        assert torch.equal(linear_log1p_max(*given), y)
    for kept in range(3):
        some = [t if place == kept else t.detach() for place, t in enumerate(given)]
        equal(gradients(linear_log1p_max(*some), some[kept]), [y, whole[1 + kept]])


def test_second_derivatives_and_batches_are_refused():
    x, weight, bias = leaves(2, 5)
    y = linear_log1p_max(x, weight, bias)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        dx.sum().backward()
    y = linear_log1p_max(x, weight, bias)
    with pytest.raises(RuntimeError, match="linear_log1p_max has no batched gradients"):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape).double(), is_grads_batched=True)


def test_under_autocast():
    x, weight, bias = leaves(2, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_log1p_max(x, weight, bias)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert {g.dtype for g in grads} == {torch.float32}
    assert torch.equal(y, linear_log1p_max(*(t.bfloat16() for t in (x, weight, bias))))


def test_compilers_see_the_reference():
    x, weight, bias = leaves(11)
    bounds = torch.tensor([0, 4, 4, 11], dtype=torch.int32)

    def call(x, bounds):
        return linear_log1p_max(x, weight, bias, cu_seqlens=bounds, max_seqlen=7)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x, bounds)
    equal(gradients(compiled, x), gradients(call(x, bounds), x), exactly=False)


def test_it_takes_the_place_of_a_models_decoder():
    """As the docstring shows."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = transformers.BertForMaskedLM(config).eval()
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    tokens = {"input_ids": torch.randint(60, (2, 9)), "attention_mask": mask.long()}
    with torch.no_grad():
        logits = model(**tokens).logits
        head, hidden = model.cls.predictions, bertfast.optimize(model).bert(**tokens)
        vectors = linear_log1p_max(
            head.transform(hidden.last_hidden_state),
            head.decoder.weight,
            head.decoder.bias,
            key_mask=tokens["attention_mask"].bool(),
        )
    expected = (torch.log1p(torch.relu(logits)) * mask[..., None]).max(1).values
    assert vectors.any()
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-5)


BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=torch.zeros(8)), ValueError, r"x must have shape \[batch, length, width\] or"),
        (dict(x=torch.zeros(2, 5, 8).long()), TypeError, "x must have dtype"),
        (dict(weight=torch.zeros(30, 7)), ValueError, "weight must have shape"),
        (dict(bias=torch.zeros(29)), ValueError, r"bias must have shape \[30\]"),
        (dict(key_mask=torch.ones(2, 5)), TypeError, "key_mask must have dtype torch.bool"),
        (dict(key_mask=torch.ones(2, 4).bool()), ValueError, r"key_mask must have shape \[2, 5\]"),
        (dict(cu_seqlens=BOUNDS), ValueError, "cu_seqlens must be None where x is padded"),
        (dict(x=torch.zeros(5, 8)), TypeError, "cu_seqlens must be an int32 tensor"),
        (dict(x=torch.zeros(5, 8), cu_seqlens=BOUNDS), TypeError, "max_seqlen must be an int"),
        (
            dict(x=torch.zeros(6, 8), cu_seqlens=BOUNDS, max_seqlen=3),
            ValueError,
            "cu_seqlens must end at 6, x's tokens, got 5",
        ),
        (dict(backend="cuda"), ValueError, "linear_log1p_max has no cuda kernels yet"),
    ],
)
def test_errors(change, error, text):
    given = dict(x=torch.zeros(2, 5, 8), weight=torch.zeros(30, 8))
    with pytest.raises(error, match=text):
        linear_log1p_max(**(given | change))


@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_logits_of_all_tokens_never_exist(layout, monkeypatch):
    """At its most, forward and backward take the gradients, some copies of x and a chunk."""
    inputs = table.make_inputs(Case((128,) * 8, 16, 3000, layout), torch.float32)
    tokens, entries = 8 * 128, 8 * 3000
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64 * 4 * tokens)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        table.run(inputs, "torch")
    now = most = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    # Of an entry: numbers of words, tokens and places, in 64 bits, and top, dlogit, dy.
    bound = 6 * (inputs["x"].nbytes + inputs["weight"].nbytes) + 4 * 64 * tokens * 4 + 80 * entries
    assert most < bound < 0.5 * tokens * 3000 * 4
