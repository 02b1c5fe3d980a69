"""linear_cross_entropy's kernels: the case table, and what only they can get wrong."""

import pytest
import torch

from bertfast.ops import dispatch, linear_cross_entropy
from bertfast.ops.cross_entropy import chunks
from bertfast.testing import hold_to_budget, nearest_to_budget
from bertfast.testing import linear_cross_entropy as table
from bertfast.testing.linear_cross_entropy import Case

OP = "linear_cross_entropy"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])

# Rows that fill a chunk of 64, and one more; a row; a vocabulary of one word, of one more than a
# tile's columns, of one less than a multiple of what rows are apart by, and BERT's.
EDGES = [
    Case(64, 8, 20, share=1.0, reduction="sum"),
    Case(65, 8, 20, share=1.0, smoothing=0.1),
    Case(1, 16, 50, reduction="none"),
    Case(21, 8, 1),
    Case(21, 8, 1, reduction="none", smoothing=0.1),
    Case(4, 8, 1025, share=1.0, bias=False),
    Case(7, 8, 1039, share=1.0, smoothing=0.2),
    Case(3, 8, 30522, share=1.0, bias=False),
]


@pytest.fixture
def kernels(target, need, monkeypatch):
    """(backend, device) of the op's kernels, in chunks of 64 rows."""
    need(OP, target)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 0)
    return target


@dtypes
@pytest.mark.parametrize("case", [*table.quick_cases(), *EDGES], ids=str)
def test_they_stay_within_the_error_budget(case, dtype, kernels):
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, *kernels))


def moved(loss, dz):
    """A label's gradient a word further."""
    return loss, dz.roll(1, 1)


def rounded(loss, dz):
    return loss.bfloat16().float(), dz


def a_hundredth(loss, dz):
    return loss, dz * 1.01


def behind(loss, dz):
    """The last word left out, as by a mask that is off by one."""
    dz = dz.clone()
    dz[:, -1] = 0
    return loss, dz


@pytest.mark.parametrize("fault", [moved, rounded, a_hundredth, behind])
def test_a_planted_fault_is_caught(fault, kernels, monkeypatch):
    module = dispatch.backend_module(OP, kernels[0])
    right = module.forward

    def wrong(z, bias, labels, smoothing, losses, scale, dz, dbias):
        right(z, bias, labels, smoothing, losses, scale, dz, dbias)
        bad = fault(losses.clone(), dz.clone())
        losses.copy_(bad[0])
        dz.copy_(bad[1])

    inputs = table.make_inputs(Case(20, 16, 50, share=1.0), torch.float32)
    assert nearest_to_budget(table, inputs, table.run(inputs, *kernels)).ok
    monkeypatch.setattr(module, "forward", wrong)
    assert not nearest_to_budget(table, inputs, table.run(inputs, *kernels)).ok


def test_the_same_bits_each_run_whatever_lies_in_memory(kernels, monkeypatch):
    """Rooms for chunks are new memory, full of NaN: it is read behind the vocabulary's end."""
    inputs = table.make_inputs(Case(70, 8, 35, share=1.0, smoothing=0.1), torch.bfloat16)
    first = table.run(inputs, *kernels)
    real = torch.Tensor.new_empty

    def full_of_nan(self, *arguments, **options):
        made = real(self, *arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", full_of_nan)
    again = table.run(inputs, *kernels)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_row_without_a_label_counts_for_nothing(kernels):
    """Of rows that fill `labelled`, a NaN too."""
    backend, device = kernels
    torch.manual_seed(0)
    shapes = (30, 16), (50, 16), (50,)
    given = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    labels = torch.randint(0, 50, (30,)).where(torch.arange(30) < 11, -100).to(device)
    with torch.no_grad():
        given[0][12] = torch.nan
    for reduction in ("sum", "none"):
        results = []
        for labelled in (None, 20):
            loss = linear_cross_entropy(
                *given[:2],
                labels,
                bias=given[2],
                labelled=labelled,
                reduction=reduction,
                backend=backend,
            )
            results.append((loss, *torch.autograd.grad(loss.sum(), given)))
        for one, other in zip(*results, strict=True):
            assert one.isfinite().all()
            torch.testing.assert_close(one, other)


def test_a_frozen_bias_and_no_gradients(kernels):
    backend, device = kernels
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(s, device=device) for s in ((9, 8), (20, 8), (20,)))
    labels = torch.randint(0, 20, (9,)).to(device)
    found = []
    for name in ("torch", backend):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, labels, bias=bias, backend=name)
        plain = linear_cross_entropy(hidden, weight, labels, bias=bias, backend=name)
        assert not plain.requires_grad and torch.equal(plain, loss.detach())
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_it_refuses():
    hidden, weight, labels = torch.zeros(3, 4).double(), torch.zeros(5, 4).double(), torch.ones(3)
    if dispatch.unsupported_reason(OP, "triton", "cpu") is None:
        with pytest.raises(ValueError, match="hidden must be float32, float16 or bfloat16, got"):
            linear_cross_entropy(hidden, weight, labels.long(), backend="triton")
    with pytest.raises(ValueError, match="linear_cross_entropy has no cuda kernels yet"):
        linear_cross_entropy(hidden, weight, labels.long(), backend="cuda")
    assert linear_cross_entropy(hidden, weight, labels.long()).dtype == torch.float64


@pytest.mark.triton
def test_rows_that_are_not_apart_as_they_are_read_are_refused():
    triton = dispatch.backend_module(OP, "triton")
    if isinstance(triton, str):
        pytest.skip(triton)
    labels, losses = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    for z in (torch.zeros(2, 20), torch.zeros(2, 32)[:, ::2], torch.zeros(20, 32).t()[:2, :]):
        with pytest.raises(AssertionError, match="apart by a multiple of 16 values"):
            triton.forward(z, None, labels, 0.0, losses, None, None, None)


def test_gradients_in_float16_outlive_a_mean_over_rows(kernels):
    """While they are in 16 bits they are those of the sum. Divided by the rows before, dz would be
    27.5 of float16's smallest steps here, and 28 rounded."""
    backend, device = kernels
    torch.manual_seed(0)
    rows, words = 100, 6100
    hidden = torch.randn(rows, 8, device=device).half().requires_grad_()
    weight = (torch.randn(words, 8, device=device) * 1e-3).half().requires_grad_()
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    loss = linear_cross_entropy(hidden, weight, labels, backend=backend)
    (mine,) = torch.autograd.grad(loss * 2.0**16, weight)  # as by a gradient scaler
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(*exact, labels, backend="torch")
    (right,) = torch.autograd.grad(loss * 2.0**16, exact[1])
    error = (mine.double() - right)[1:].norm() / right[1:].norm()
    assert error < 2e-3
