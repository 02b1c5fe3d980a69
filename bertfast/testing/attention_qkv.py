"""attention_qkv's cases: attention's, with q, k and v in one buffer."""

from .attention import (  # noqa: F401
    Case,
    cases,
    make_inputs,
    oracle,
    plain_torch,
    quick_cases,
    rounding_model,
    scales,
)
from .attention import run_qkv as run  # noqa: F401
