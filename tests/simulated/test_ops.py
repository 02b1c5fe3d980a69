"""The ops on a device that is not the current one, held to their budgets."""

import pytest
import torch

from bertfast.ops.attention.limits import FEATURES
from bertfast.testing import (
    attention,
    bias_gelu,
    gated,
    hold_to_budget,
    layer_norm,
    linear_gated,
    linear_gelu,
)
from bertfast.testing import attention_qkv as attention_qkv_table

TABLES = {
    "layer_norm": layer_norm,
    "bias_gelu": bias_gelu,
    "gated": gated,
    "attention": attention,
    "attention_qkv": attention_qkv_table,
    "linear_gelu": linear_gelu,
    "linear_gated": linear_gated,
}
# Of Triton, whose interpreter is slow, the first few: what matters here is where tensors lie.
CASES = [
    pytest.param(op, case, backend, dtype, id=f"{op}-{case}-{backend}-{dtype}")
    for op, table in TABLES.items()
    for backend, dtype in (
        ("cuda", torch.bfloat16),
        ("triton", torch.float16 if op.startswith("linear_") else torch.float32),
    )
    for case in table.quick_cases()[: 3 if backend == "triton" else None]
    if set(getattr(case, "features", ())) <= set(FEATURES[backend])
]


@pytest.mark.parametrize("op, case, backend, dtype", CASES)
def test_budget(op, case, backend, dtype):
    table = TABLES[op]
    inputs = table.make_inputs(case, dtype)
    actual = table.run(inputs, backend, "cuda:1")
    assert {value.device for value in actual.values()} == {torch.device("cuda:1")}
    hold_to_budget(table, inputs, actual)
