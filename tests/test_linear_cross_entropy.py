"""linear_cross_entropy: the case table against float64, and beside torch's cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from bertfast.ops import linear_cross_entropy
from bertfast.ops.cross_entropy import chunks, reference_rows
from bertfast.testing import compare, hold_to_budget, worst
from bertfast.testing import linear_cross_entropy as table
from bertfast.testing.linear_cross_entropy import Case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


@pytest.fixture(params=[False, True], ids=["one-chunk", "chunks"])
def chunked(request, monkeypatch):
    """Of 64 rows, or as large as they usually are."""
    if request.param:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 0)


@dtypes
@pytest.mark.parametrize("case", table.cases(), ids=str)
def test_it_stays_within_the_error_budget(case, dtype, monkeypatch):
    """In chunks of 64 rows."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 0)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, "torch"))


@pytest.mark.parametrize("fault", ["a label too many", "fp16 sums"])
def test_budget_catches_a_planted_fault(fault):
    inputs = table.make_inputs(Case(301, 32, 90, share=0.9), torch.float16)

    def one_more(dz):
        dz = dz.clone()
        dz[inputs["labels"] == table.IGNORED] = dz[0] * 0.01
        return dz

    def in_fp16(dz, hidden):
        total = torch.zeros(dz.shape[1], hidden.shape[1], dtype=torch.float16)
        for one, other in zip(dz, hidden, strict=True):
            total += torch.outer(one, other).half()
        return total

    good = table.rounding_model(inputs)
    if fault == "fp16 sums":
        bad = table.rounding_model(inputs, weight_sum=in_fp16)
    else:
        bad = table.rounding_model(inputs, dlogits=one_more)
    oracle, scales = table.oracle(inputs), table.scales(inputs)
    assert worst(compare(good, oracle, good, scales)).ok
    assert not worst(compare(bad, oracle, good, scales)).ok


def leaves(rows=30, width=16, vocabulary=50, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (rows, width), (vocabulary, width), (vocabulary,)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def stock(hidden, weight, bias, labels, **options):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labelled", [None, 0, 7])
def test_without_any_label(reduction, labelled):
    given, labels = leaves(), torch.full((30,), -100)
    results = []
    for loss in (
        linear_cross_entropy(
            *given[:2], labels, bias=given[2], reduction=reduction, labelled=labelled
        ),
        stock(*given, labels, reduction=reduction),
    ):
        results.append((loss, *torch.autograd.grad(loss.sum(), given)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labelled", [None, 11, 20, 500])
@pytest.mark.parametrize("ignored", [-100, 3])
def test_a_bound_of_the_labels_changes_nothing(reduction, labelled, ignored, chunked):
    given = leaves()
    labels = torch.randint(4, 50, (3, 10)).where(torch.arange(30).view(3, 10) < 11, ignored)
    hidden = given[0].view(3, 10, 16)
    options = dict(ignore_index=ignored, reduction=reduction)
    loss = linear_cross_entropy(
        hidden, given[1], labels, bias=given[2], labelled=labelled, **options
    )
    expected = stock(hidden, *given[1:], labels, **options)
    assert loss.shape == (labels.shape if reduction == "none" else ())
    torch.testing.assert_close(loss.flatten(), expected.flatten())
    weighting = torch.randn(loss.shape, dtype=torch.float64)
    mine = torch.autograd.grad(loss, given, weighting)
    other = torch.autograd.grad(expected, given, weighting.view(expected.shape))
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two)


def test_more_labels_than_their_bound():
    hidden, weight, _ = leaves()
    with pytest.raises(ValueError, match="labelled must be 30 or more, the labels, got 29"):
        linear_cross_entropy(hidden, weight, torch.zeros(30, dtype=torch.int64), labelled=29)


@pytest.mark.parametrize("label", [-1, 50, 2**40])
def test_a_label_out_of_range(label):
    hidden, weight, _ = leaves()
    labels = torch.zeros(30, dtype=torch.int64)
    labels[7] = label
    with pytest.raises(ValueError, match=f"between 0 and 49, got {label}"):
        linear_cross_entropy(hidden, weight, labels)
    negated = torch._neg_view(hidden.detach())  # as while something is traced
    with pytest.raises(ValueError, match=f"between 0 and 49, got {label}"):
        linear_cross_entropy(negated, weight, labels)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            dict(labels=torch.zeros(30)),
            TypeError,
            "labels must be an int64 tensor, got torch.float",
        ),
        (dict(labels=torch.zeros(29, dtype=torch.int64)), ValueError, r"have shape \[30\] on cpu"),
        (dict(weight=torch.zeros(50, 15)), ValueError, "weight must have shape"),
        (dict(bias=torch.zeros(49, dtype=torch.float64)), ValueError, "bias must have shape"),
        (dict(bias=torch.zeros(50)), TypeError, r"bias must have dtype torch.float64 \(hidden's\)"),
        (dict(reduction="max"), ValueError, "reduction must be"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing must be between 0 and 1"),
        (dict(labelled=-1), ValueError, "labelled must be between 0 and"),
        (dict(ignore_index=1.0), TypeError, "ignore_index must be an int"),
    ],
)
def test_errors(change, error, text):
    hidden, weight, _ = leaves()
    given = dict(hidden=hidden, weight=weight, labels=torch.zeros(30, dtype=torch.int64))
    with pytest.raises(error, match=text):
        linear_cross_entropy(**(given | change))


def test_tied_weights_and_frozen_parts():
    hidden, weight, bias = leaves()
    labels = torch.randint(0, 50, (30,))
    expected = torch.autograd.grad(stock(weight[:30] * 2, weight, bias, labels), weight)
    found = torch.autograd.grad(
        linear_cross_entropy(weight[:30] * 2, weight, labels, bias=bias), weight
    )
    torch.testing.assert_close(found, expected)
    weight.requires_grad_(False)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    expected = stock(hidden, weight, bias, labels)
    for mine, other in zip(
        torch.autograd.grad(loss, (hidden, bias)),
        torch.autograd.grad(expected, (hidden, bias)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_a_second_backward_and_a_second_derivative():
    hidden, weight, bias = leaves()
    labels = torch.randint(0, 50, (30,))
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(3 * one, other)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_gradients(dtype):
    hidden, weight, bias = leaves(dtype=dtype)
    labels = torch.randint(0, 50, (30,))
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    several = torch.randn(3)
    options = dict(retain_graph=True)
    batch = torch.autograd.grad(loss, (hidden, bias), several, is_grads_batched=True, **options)
    for number, one in enumerate(several):
        for grads, grad in zip(
            batch, torch.autograd.grad(loss, (hidden, bias), one, **options), strict=True
        ):
            assert torch.equal(grads[number], grad)
    losses = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="none")
    with pytest.raises(RuntimeError, match="reduction='none' has no batched gradients"):
        torch.autograd.grad(losses, hidden, torch.randn(3, 30), is_grads_batched=True)


def test_without_gradients_none_are_made(monkeypatch):
    given = leaves()
    asked = []
    real = chunks.losses_and_gradients
    monkeypatch.setattr(
        "bertfast.ops.cross_entropy.losses_and_gradients",
        lambda *arguments: asked.append(arguments[-3:-1]) or real(*arguments),
    )
    with torch.no_grad():
        linear_cross_entropy(*given[:2], torch.randint(0, 50, (30,)), bias=given[2])
    assert asked == [(None, chunks.NOTHING)]


def test_under_autocast():
    hidden, weight, bias = leaves(dtype=torch.float32)
    labels = torch.randint(0, 50, (30,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss.dtype == torch.float32 and {g.dtype for g in grads} == {torch.float32}
    expected = stock(*(t.bfloat16().float() for t in (hidden, weight, bias)), labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_transforms_and_compilers_see_the_reference():
    hidden, weight, bias = leaves()
    labels = torch.randint(0, 50, (30,))

    def loss(hidden):
        return linear_cross_entropy(hidden, weight, labels, bias=bias)

    expected = torch.autograd.grad(stock(hidden, weight, bias, labels), hidden)[0]
    torch.testing.assert_close(torch.func.grad(loss)(hidden), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    torch.testing.assert_close(torch.autograd.grad(compiled, hidden)[0], expected)


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 129, 1000])
def test_chunks_are_alike_and_begin_at_whole_16_bytes(rows, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 200 * 50 * 4)
    sizes, real = [], reference_rows.forward
    monkeypatch.setattr(
        reference_rows, "forward", lambda z, *more: sizes.append(len(z)) or real(z, *more)
    )
    hidden, weight, bias = leaves(max(rows, 1))
    labels = torch.randint(0, 50, (rows,))
    linear_cross_entropy(hidden[:rows], weight, labels, bias=bias)
    assert sum(sizes) == rows and max(sizes, default=0) <= 192
    assert len(sizes) == -(-rows // 192)
    assert all(size % 16 == 0 for size in sizes[:-1]) and len(set(sizes[:-1])) <= 1


def test_logits_of_the_batch_never_exist(monkeypatch):
    """At its most, forward and backward take the gradients, a copy of the weight and a chunk."""
    rows, width, vocabulary = 4096, 32, 3000
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64 * 4 * vocabulary)
    hidden, weight, bias = leaves(rows, width, vocabulary, torch.float32)
    labels = torch.randint(0, vocabulary, (rows,)).where(torch.rand(rows) < 0.15, -100)

    def step():
        linear_cross_entropy(hidden, weight, labels, bias=bias).backward()

    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    now = most = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    chunk = 64 * vocabulary * 4
    own = 3 * (hidden.nbytes + weight.nbytes)
    assert most < own + 4 * chunk < 0.15 * rows * vocabulary * 4
