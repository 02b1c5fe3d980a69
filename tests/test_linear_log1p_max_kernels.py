"""linear_log1p_max's kernel: the case table, and what only it can get wrong."""

import pytest
import torch

from bertfast.ops import dispatch, linear_log1p_max
from bertfast.ops.log1p_max import chunks
from bertfast.testing import hold_to_budget, nearest_to_budget
from bertfast.testing import linear_log1p_max as table
from bertfast.testing.linear_log1p_max import Case

OP = "linear_log1p_max"

# A sequence of a tile's tokens, one more, one fewer; words of a tile, and one more.
EDGES = [
    Case((15, 16, 17, 33), 8, 128, "packed"),
    Case((16, 31), 8, 129, "holes", bias=False),
    Case((0, 0), 8, 20),
    Case((), 8, 20, "packed"),
]


@pytest.fixture
def kernels(target, need, monkeypatch):
    """(backend, device) of the op's kernel, in chunks of 64 words."""
    need(OP, target)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 0)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*table.quick_cases(), *EDGES], ids=str)
def test_it_stays_within_the_error_budget(case, dtype, kernels, monkeypatch):
    if case.vocabulary > 127:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 20)  # a chunk of more than a tile
    inputs = table.make_inputs(case, dtype)
    hold_to_budget(table, inputs, table.run(inputs, *kernels))


def next_token(top, token):
    """The one after the largest."""
    token.clamp_(max=25).add_(1)


def last_left_out(top, token):
    """As by a mask that is off by one."""
    top[:, -1] = -torch.inf


def a_thousandth(top, token):
    top *= 1.001


@pytest.mark.parametrize("fault", [next_token, last_left_out, a_thousandth])
def test_a_planted_fault_is_caught(fault, kernels, monkeypatch):
    module = dispatch.backend_module(OP, kernels[0])
    right = module.forward

    def wrong(z, sequences, top, token):
        right(z, sequences, top, token)
        fault(top, token)

    inputs = table.make_inputs(Case((5, 7, 9), 16, 50), torch.float32)
    assert nearest_to_budget(table, inputs, table.run(inputs, *kernels)).ok
    monkeypatch.setattr(module, "forward", wrong)
    assert not nearest_to_budget(table, inputs, table.run(inputs, *kernels)).ok


def test_equal_products_and_nan_are_as_torchs(kernels):
    """Tokens that are the same, in other rows of a tile and in other tiles; a NaN and an infinity
    in one of two sequences."""
    backend, device = kernels
    torch.manual_seed(0)
    rows = torch.randint(-3, 4, (7, 8)).float()
    x = torch.stack([rows[torch.randint(7, (40,))] for _ in range(3)])
    x[1, 20], x[1, 30] = torch.nan, torch.inf
    weight = torch.randint(-2, 3, (70, 8)).float()
    dy = torch.randn(3, 70)
    found = []
    for name, where in (("torch", "cpu"), kernels):
        leaves = [t.clone().to(where).requires_grad_() for t in (x, weight)]
        y = linear_log1p_max(*leaves, backend=name)
        (dx,) = torch.autograd.grad(y, leaves[:1], dy.to(where))
        found.append((y.detach().cpu(), dx.cpu()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one[::2], other[::2])
    assert all(y[1].isnan().all() and not y[::2].isnan().any() for y, _ in found)


def test_the_same_bits_each_run_whatever_lies_in_memory(kernels, monkeypatch):
    """Rooms for chunks are new memory, full of NaN."""
    inputs = table.make_inputs(Case((9, 20), 8, 35, "packed"), torch.bfloat16)
    first = table.run(inputs, *kernels)
    real = torch.Tensor.new_empty

    def full_of_nan(self, *arguments, **options):
        made = real(self, *arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", full_of_nan)
    again = table.run(inputs, *kernels)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_it_refuses(kernels):
    backend, device = kernels
    x, weight = (torch.zeros(3, 4, device=device).double() for _ in range(2))
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16, got"):
        linear_log1p_max(x[None], weight, backend=backend)
    assert linear_log1p_max(x[None], weight).dtype == torch.float64
