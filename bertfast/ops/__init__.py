"""The fused ops: the same function on every backend, differentiable, with the same numbers."""

from .attention import attention, attention_qkv
from .attention.scores import bucket_bias
from .bias_gelu import bias_gelu
from .cross_entropy import linear_cross_entropy
from .dispatch import available
from .dropout import dropout_keep_mask
from .gated import gated
from .layer_norm import layer_norm, rms_norm
from .linear import linear, linear_gelu, linear_norm
from .linear_gated import linear_gated
from .log1p_max import linear_log1p_max

__all__ = [
    "attention",
    "attention_qkv",
    "available",
    "bias_gelu",
    "bucket_bias",
    "dropout_keep_mask",
    "gated",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_gated",
    "linear_gelu",
    "linear_log1p_max",
    "linear_norm",
    "rms_norm",
]
