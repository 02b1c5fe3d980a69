"""Why float32 attention isn't multiplied by tensor cores as three TF32 products ("tf32x3").

An operand is cut into two of 11 bits each; of the four products the least is left out. Tensor cores
add eight products at a time to a sum that they cut off at float32's precision instead of rounding
it: https://arxiv.org/abs/2203.03341. All errors of a sum then have one sign.
"""

import pytest
import torch

from bertfast.testing import attention as table
from bertfast.testing.budget import compare, worst


def cut(x):
    """The leading 11 bits."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def toward_zero(exact):
    rounded = exact.float()
    beyond = rounded.double().abs() > exact.abs()
    return torch.where(beyond, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def three_products(a, b, rounded):
    a_high, b_high = cut(a), cut(b)
    a_low, b_low = cut(a - a_high), cut(b - b_high)
    total = torch.zeros(*a.shape[:-1], b.shape[-1])
    for x, y in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
        for k in range(0, a.shape[-1], 8):
            step = x[..., k : k + 8].double() @ y[..., k : k + 8, :].double()
            total = rounded(total.double() + step)
    return total


def forward(inputs, rounded):
    """The output with both products so, everything else in float32."""
    q, k, v, _, mask, _ = table._padded(inputs, torch.float32)
    scores = three_products(q, k.transpose(-1, -2), rounded) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = three_products(weights, v, rounded) / weights.sum(-1, keepdim=True)
    return {"out": table._packed_again(inputs, out)}


@pytest.mark.parametrize(
    ("rounded", "least", "most"),
    [(torch.Tensor.float, 0.0, 1.0), (toward_zero, 1.2, 4.0)],
    ids=["rounded", "cut off"],
)
@pytest.mark.parametrize("length", [140, 256])
def test_its_errors_exceed_the_budget(length, rounded, least, most):
    inputs = table.make_inputs(table.Case((length,), head_dim=64), torch.float32)
    right, model, scales = (
        {"out": found(inputs)["out"]}
        for found in (table.oracle, table.rounding_model, table.scales)
    )
    finding = worst(compare(forward(inputs, rounded), right, model, scales))
    assert least < finding.share < most
