"""attention_qkv's cases: attention's, with q, k and v in one buffer."""

from .attention import (  # noqa: F401
    Case,
    cases,
    make_inputs,
    oracle,
    plain_torch,
    rounding_model,
    scales,
)
from .attention import run_qkv as run  # noqa: F401


def quick_cases() -> list[Case]:
    """Of each layout one: the kernels are attention's, and read and write by other strides."""
    return [
        Case((70,), head_dim=64),
        Case((45, 60), mask="right", p=0.1),
        Case((17, 30, 130, 9, 40), packed=True, plan=True, p=0.1),
        Case((140,), head_dim=64),
        Case((70, 40), heads=2, mask="left", rotary=True, window=(30, 9), reach=12),
    ]
