"""A kernel gets no address of a tensor whose strides nobody looked at."""

import ast
from pathlib import Path

import pytest
import torch

import bertfast.ops
from bertfast import packing
from bertfast.ops import attention, layer_norm, pointers
from bertfast.ops.attention import registered
from bertfast.testing import attention as table
from bertfast.testing.attention import Case

OPS = Path(bertfast.ops.__file__).parent


def test_python_takes_no_addresses():
    """But of what launchers have looked at, for Triton, and to see whether rows are aligned."""
    for path in set(OPS.rglob("*.py")) - {OPS / "triton_launch.py", OPS / "rows.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Attribute) and node.attr == "data_ptr"), path


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as the first column of a matrix."""
    return torch.stack([tensor, torch.full_like(tensor, -7)], -1)[..., 0]


WIDE = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("look", "tensor"),
    [
        (pointers.dense, WIDE[:, :3]),
        (pointers.dense, apart(torch.arange(4))),
        (lambda t: pointers.row_stride(t, 3), WIDE[:, ::2]),
        (lambda t: pointers.row_stride(t, 3), WIDE.view(2, 2, 6)[..., :3]),
        (pointers.head_strides, torch.zeros(2, 3, 4, 8)[..., ::2]),
        (lambda t: pointers.shared_head_strides(torch.zeros(3, 4, 2), t), torch.zeros(3, 4, 8)),
    ],
)
def test_what_a_triton_kernel_would_misread_is_refused(look, tensor):
    with pytest.raises(AssertionError, match="a kernel reads this tensor as"):
        look(tensor)


def test_strides():
    assert pointers.dense(None) is None and pointers.dense(WIDE) is WIDE
    assert pointers.row_stride(None, 3) == 3
    assert pointers.row_stride(WIDE[:, 3:], 3) == 6
    assert pointers.row_stride(WIDE[:, ::6], 1) == 6
    heads = torch.zeros(2, 3, 4, 8)
    assert pointers.head_strides(heads[:, 1:]) == (96, 32, 8)
    assert pointers.head_strides(heads[0]) == (0, 32, 8)


@pytest.mark.parametrize("plan", [False, True])
def test_bounds_and_seed_from_a_matrix(plan, target, need, finest):
    need("attention", target)
    backend, device = target
    inputs = table.make_inputs(Case((5, 20, 9), packed=True, p=0.2), finest("attention", target))
    dense = table.options(inputs, device)
    strided = dense | {"cu_seqlens": apart(dense["cu_seqlens"]), "seed": apart(dense["seed"])}
    results = []
    for options in (dense, strided):
        if plan:
            options["plan"] = packing.plan(options["cu_seqlens"], inputs["max_seqlen"])
        leaves = [inputs[name].to(device).clone().requires_grad_() for name in table.NAMES]
        out = attention(*leaves, **options, backend=backend)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["apart", "expanded", "transposed"])
def test_masks_of_any_strides(layout, target, need, finest):
    need("attention", target)
    backend, device = target
    q, k, v = torch.randn(3, 2, 20, 2, 16, device=device).to(finest("attention", target))
    mask = (torch.arange(20, device=device) % 3 == 0).expand(2, 20)
    if layout == "apart":
        mask = torch.stack([mask, ~mask], -1)[..., 0]
    elif layout == "transposed":
        mask = mask.t().contiguous().t()
    dense = mask.contiguous()
    assert not mask.is_contiguous()
    out = attention(q, k, v, key_mask=mask, backend=backend)
    assert torch.equal(out, attention(q, k, v, key_mask=dense, backend=backend))


def test_parameters_and_row_numbers_from_a_matrix(target, need):
    need("layer_norm", target)
    backend, device = target
    x = torch.randn(6, 24, device=device)
    weight, bias, x_bias = torch.randn(3, 24, device=device)
    options = dict(dropout_p=0.3, seed=torch.tensor([5], device=device), backend=backend)
    rows = torch.arange(6, device=device) * 3
    dense = layer_norm(x, weight, bias, x_bias=x_bias, row_index=rows, **options)
    options |= dict(x_bias=apart(x_bias), row_index=apart(rows))
    assert torch.equal(layer_norm(x, apart(weight), apart(bias), **options), dense)


def test_one_token_with_the_strides_of_another_layout(target, need, finest):
    """A length of 1 may have any stride: here that of a batch too large for a tile's offsets."""
    need("attention", target)
    backend, device = target
    q = torch.randn(1, 2, 2, 16, device=device).to(finest("attention", target)).transpose(0, 1)
    far = q.as_strided(q.shape, (q.stride(0), 2**23, *q.stride()[2:]))
    assert torch.equal(
        attention(far, far, far, backend=backend), attention(q, q, q, backend=backend)
    )


def test_a_registered_op_makes_dense_what_it_is_given(target, need, finest):
    """Compiled code calls it without the public function."""
    need("attention", target)
    backend, device = target
    inputs = table.make_inputs(Case((5, 20), packed=True), finest("attention", target))
    parts = [inputs[name].to(device) for name in table.NAMES]
    cu = inputs["cu_seqlens"].to(device)
    tiles = packing.plan(cu, 20).tiles
    rest = (32, None, 20, 0.25, 0, 0, backend)
    want = registered.infer.dispatched(*parts, None, cu, tiles, *rest)
    got = registered.infer.dispatched(*parts, None, apart(cu), apart(tiles), *rest)
    assert torch.equal(got, want)
