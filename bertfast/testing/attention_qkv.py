"""attention_qkv's cases: attention's, with q, k and v in one buffer."""

from .attention import run_qkv as run  # noqa: F401
