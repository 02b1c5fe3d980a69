"""layer_norm's copy of y in x's 16 bits, which a float32 stream's next product reads."""

import pytest
import torch
from support.guard import guarded_allocations

from bertfast.ops import dispatch, dropout
from bertfast.ops.layer_norm.run import Norm, Outputs
from bertfast.testing import compare, worst
from bertfast.testing import layer_norm as table
from bertfast.testing.layer_norm import Case

HALF, BF16 = torch.float16, torch.bfloat16
CASES = [
    Case((2, 3, 384), p=0.1),
    Case((5, 768)),
    Case((2, 3, 768), p=0.1, row_index=True),
    Case((7, 1024), x_bias=False, residual=False),
    Case((3, 1023), p=0.1),
    Case((4, 130), residual=False),
    Case((2, 4096)),
]
dtypes = pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])


def outputs(x: torch.Tensor, save: bool, copy: bool) -> Outputs:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=x.device)

    rows = x.numel() // x.shape[-1]
    saved = (new(*x.shape), new(rows), new(rows)) if save else (None, None, None)
    return Outputs(new(*x.shape), *saved, new(*x.shape, dtype=x.dtype) if copy else None)


def run(inputs: dict, target: tuple[str, str], save: bool, copy: bool) -> Outputs:
    backend, device = target

    def there(name: str) -> torch.Tensor | None:
        return None if inputs[name] is None else inputs[name].to(device)

    x = there("x")
    arguments = (x, there("residual"), there("x_bias"))
    norm = Norm(there("weight"), there("bias"), inputs["eps"])
    seed, rows = there("seed"), there("row_index")
    drop = dropout.dropout_of(inputs["p"], seed, inputs["site"], x.device, rows)
    with guarded_allocations():
        outs = outputs(x, save, copy)
        dispatch.backend_module("layer_norm", backend).forward(*arguments, norm, drop, outs)
    return outs


def mixed_inputs(case: Case, dtype: torch.dtype) -> dict:
    """16-bit x below a float32 stream."""
    inputs = table.make_inputs(case, torch.float32)
    return inputs | {"x": inputs["x"].to(dtype)}


@dtypes
@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_copy_is_y_rounded_once(case, save, dtype, target, need):
    need("layer_norm", target)
    inputs = mixed_inputs(case, dtype)
    outs, plain = run(inputs, target, save, copy=True), run(inputs, target, save, copy=False)
    assert torch.equal(outs.copy, outs.y.to(dtype))
    for name in ("y", "z", "mean", "rstd"):
        value, without = getattr(outs, name), getattr(plain, name)
        assert (value is None and without is None) or torch.equal(value, without), name
    oracle, model = ({"copy": of(inputs)["y"]} for of in (table.oracle, table.rounding_model))
    model["copy"] = model["copy"].to(dtype)
    finding = worst(compare({"copy": outs.copy}, oracle, model))
    assert finding.ok, str(finding)


def test_the_budget_catches_a_copy_rounded_to_fewer_bits():
    inputs = mixed_inputs(Case((5, 768)), HALF)
    y = table.rounding_model(inputs)["y"]
    oracle, model = {"copy": table.oracle(inputs)["y"]}, {"copy": y.half()}
    assert worst(compare({"copy": y.half()}, oracle, model)).ok
    assert not worst(compare({"copy": y.bfloat16().half()}, oracle, model)).ok


@pytest.mark.host
def test_the_binding_refuses_a_copy_that_is_not_narrower_than_y():
    host = pytest.importorskip("bertfast._host")
    norm = Norm(torch.ones(8), torch.zeros(8), 1e-12)

    def call(x: torch.Tensor, copy: torch.Tensor) -> None:
        outs = Outputs(torch.empty(2, 8), None, None, None, copy)
        host.layer_norm_forward(x, None, None, norm, dropout.NO_DROPOUT, outs)

    x = torch.randn(2, 8)
    call(x.half(), torch.empty(2, 8, dtype=HALF))
    for copy in (torch.empty(2, 8, dtype=BF16), torch.empty(2, 8), torch.empty(3, 8).half()):
        with pytest.raises(AssertionError, match="a kernel reads copy as 16 dense elements"):
            call(x.half(), copy)
    with pytest.raises(AssertionError, match="a kernel reads y as wider than x"):
        call(x, torch.empty(2, 8, dtype=HALF))
