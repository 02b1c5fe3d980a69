"""Bindings of products with an activation refuse memory that isn't what a kernel takes it for."""

import re

import pytest
import torch
from test_bindings import (  # noqa: F401
    DENSE,
    OF_ROWS,
    ROWS,
    WIDTH,
    Call,
    as_half,
    host,
    longer,
    new,
    off,
    refused,
)

pytestmark = pytest.mark.host


def gap_of_4(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x[:, :4]], 1)[:, : x.shape[1]]


def as_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16()


def halves(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half()


def test_linear_gelu(host):  # noqa: F811
    of_rows = (*OF_ROWS, as_bfloat16, off, gap_of_4)
    dense = (*DENSE, as_bfloat16, off)
    call = Call(
        host,
        "linear_gelu_forward",
        {
            "x": halves(ROWS, 16),
            "weight": halves(WIDTH, 16),
            "bias": halves(WIDTH),
            "tanh": False,
            "y": halves(ROWS, WIDTH),
            "u": halves(ROWS, WIDTH),
        },
    )
    dense_rows = (*OF_ROWS, as_bfloat16, off, gap_of_4)
    cases = {"x": of_rows, "weight": of_rows, "bias": dense, "y": dense_rows, "u": dense_rows}
    cases["x"] = tuple(spoil for spoil in of_rows if spoil is not as_bfloat16)
    refused(call, cases)
    with pytest.raises(AssertionError, match="a kernel reads weight as .* of bfloat16"):
        call("x", as_bfloat16)
    call = Call(
        host,
        "linear_gelu_backward",
        {
            "dy": halves(ROWS, 16),
            "weight": halves(16, WIDTH),
            "u": halves(ROWS, WIDTH),
            "bias": halves(WIDTH),
            "tanh": True,
            "dv": halves(ROWS, WIDTH),
            "dbias": halves(WIDTH),
            "partial": new(*host.linear_gelu_partial_shape(halves(ROWS, WIDTH))),
        },
    )
    cases = {"dy": cases["x"], "weight": of_rows, "bias": dense, "u": dense_rows, "dv": dense_rows}
    refused(call, cases | {"dbias": (*DENSE, as_bfloat16), "partial": (longer, as_half)})


def test_linear_gated(host):  # noqa: F811
    of_rows = (*OF_ROWS, as_bfloat16, off, gap_of_4)
    dense = (*DENSE, as_bfloat16, off)
    call = Call(
        host,
        "linear_gated_forward",
        {
            "x": halves(ROWS, 16),
            "weight": halves(2 * WIDTH, 16),
            "bias": halves(2 * WIDTH),
            "activation": 2,
            "y": halves(ROWS, WIDTH),
            "u": halves(ROWS, 2 * WIDTH),
        },
    )
    cases = {"x": (*OF_ROWS, off, gap_of_4), "weight": of_rows, "bias": dense}
    refused(call, cases | {"y": of_rows, "u": of_rows})
    call = Call(
        host,
        "linear_gated_backward",
        {
            "dy": halves(ROWS, 16),
            "weight": halves(16, WIDTH),
            "u": halves(ROWS, 2 * WIDTH),
            "bias": halves(2 * WIDTH),
            "activation": 0,
            "du": halves(ROWS, 2 * WIDTH),
            "dbias": halves(2 * WIDTH),
            "partial": new(*host.linear_gated_partial_shape(halves(ROWS, 2 * WIDTH))),
        },
    )
    cases = {"dy": cases["x"], "weight": of_rows, "bias": dense, "u": of_rows, "du": of_rows}
    refused(call, cases | {"dbias": (*DENSE, as_bfloat16), "partial": (longer, as_half)})


def test_linear_gateds_numbers(host):  # noqa: F811
    def forward(rows: int, activation: int = 0) -> None:
        x, y = halves(1, 8), torch.empty(1, 8, dtype=torch.float16)
        weight = halves(1, 8).expand(rows, 8)
        host.linear_gated_forward(x, weight, None, activation, y, None)

    def backward(columns: int) -> None:
        dy, du = halves(1, 8), torch.empty(1, 16, dtype=torch.float16)
        weight = halves(8, 1).expand(8, columns)
        host.linear_gated_backward(dy, weight, du, None, 0, du, None, None)

    for call, text in (
        (lambda: forward(24), "the number of outputs must be a multiple of 16, got 24"),
        (lambda: forward(2**24 + 16), "at most 2**24, got 16777232"),
        (lambda: forward(16, 3), "the activation must be 0, 1 or 2"),
        (lambda: backward(12), "the number of outputs must be a multiple of 16, got 24"),
        (lambda: backward(2**23 + 8), "at most 2**24, got 16777232"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            call()


def test_linear_gelus_numbers(host):  # noqa: F811
    def run(x: torch.Tensor, weight: torch.Tensor) -> None:
        y = torch.empty(1, weight.shape[0], dtype=torch.float16)
        host.linear_gelu_forward(x, weight, None, False, y, None)

    run(halves(1, 8), halves(8, 8))
    for x, weight, text in (
        (halves(0, 8), halves(8, 8), "the number of rows must be between 1 and"),
        (halves(1, 8).expand(2**30 + 1, 8), halves(8, 8), "at most 2**30 rows, got 1073741825"),
        (halves(1, 12), halves(8, 12), "the number of inputs must be a multiple of 8, got 12"),
        (halves(1, 0), halves(8, 0), "the number of inputs must be between 1 and"),
        (halves(1, 8), halves(12, 8), "the number of outputs must be a multiple of 8, got 12"),
        (halves(1, 8), halves(1, 8).expand(2**25, 8), "at most 2**24, got 33554432"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            run(x, weight)
    with pytest.raises(AssertionError, match="a kernel reads x as float16 or bfloat16"):
        run(new(1, 8), new(8, 8))
    with pytest.raises(AssertionError, match="a kernel reads x as a matrix"):
        run(halves(8), halves(8, 8))
