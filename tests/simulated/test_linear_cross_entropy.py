"""linear_cross_entropy where the host must not wait for a GPU, and can't look at labels."""

import pytest
import torch
from support.simulated_gpu import cuda, kernels, products

from bertfast.ops import linear_cross_entropy
from bertfast.testing import hold_to_budget
from bertfast.testing import linear_cross_entropy as table

DEVICE = "cuda:1"


def given(rows=12, width=8, words=21):
    torch.manual_seed(0)
    shapes = (rows, width), (words, width), (words,)
    leaves = [torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes]
    labels = torch.randint(0, words, (rows,)).where(torch.arange(rows) % 3 == 0, -100)
    return *leaves, labels.to(DEVICE)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labelled, waits", [(None, 1), (4, 0), (7, 0), (12, 0)])
def test_the_host_waits_only_to_count_labels(backend, reduction, labelled, waits):
    hidden, weight, bias, labels = given()
    options = dict(bias=bias, labelled=labelled, reduction=reduction, backend=backend)
    before, started = cuda.waits(), len(kernels.launches)
    loss = linear_cross_entropy(hidden, weight, labels, **options)
    torch.autograd.grad(loss.sum(), (hidden, weight, bias))
    assert cuda.waits() == before + waits, cuda.last_wait()
    launched = {each.kernel for each in kernels.launches[started:]}
    ours = {"cross_entropy_loss_kernel", "cross_entropy_dz_kernel", "column_sum_kernel"}
    assert launched == (ours if backend == "auto" else set())


def test_it_can_be_captured():
    hidden, weight, bias, labels = given()
    results = []
    for context in (torch.no_grad, cuda.capture):
        with context(), torch.enable_grad():
            loss = linear_cross_entropy(hidden, weight, labels, bias=bias, labelled=4)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_is_wrong_with_labels_is_asserted_there():
    """A real GPU stops at its assertion; here it raises at once."""
    hidden, weight, bias, labels = given()
    with pytest.raises(RuntimeError, match="more labels than `labelled` says"):
        linear_cross_entropy(hidden, weight, labels, labelled=3)
    for wrong in (-1, 21):
        labels[1] = wrong
        with pytest.raises(RuntimeError, match="labels must be ignore_index or between 0 and 20"):
            linear_cross_entropy(hidden, weight, labels, labelled=12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", table.quick_cases(), ids=str)
def test_the_budget_in_16_bits(case, backend, dtype, monkeypatch):
    monkeypatch.setattr(torch, "mm", products.mm)
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, backend, DEVICE))
