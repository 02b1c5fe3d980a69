"""linear_log1p_max: the sparse vector of a text by a masked language model's head (SPLADE). Check,
choose, run.

Of each sequence and word only the largest logit counts, so the logits of all tokens never exist:
chunks.py makes them for some words at a time, and a backend finds the largest of a chunk.
"""

import operator

import torch

from ... import checks, packing, tracing
from .. import dispatch
from ..attention.check import check_layout
from ..registration import any_requires_grad
from . import reference
from .registered import LinearLog1pMax, largest_logits, vector

__all__ = ["linear_log1p_max"]


def linear_log1p_max(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    key_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """log(1 + relu(x weight^T + bias)), the largest over each sequence's tokens: SPLADE's vectors.

    x is (batch, length, width), with key_mask, bool (batch, length), True where a token counts; or
    packed (tokens, width), with cu_seqlens, int32 (sequences + 1), and max_seqlen. weight is
    (vocabulary, width), bias (vocabulary,). The result is (sequences, vocabulary), in x's dtype;
    logits are compared in float32 (float64 stays so) and rounded once. A sequence without tokens
    gives zeros, and what lies in masked tokens counts for nothing.

    Each value's gradient goes to the token of its largest product, the first where several are
    equal; where the largest logit isn't positive there is none.

    Of a BertForMaskedLM, converted by bertfast.optimize or not, it takes the decoder's place:

        hidden = model.bert(**tokens).last_hidden_state
        head = model.cls.predictions
        vectors = linear_log1p_max(
            head.transform(hidden),
            head.decoder.weight,
            head.decoder.bias,
            key_mask=tokens["attention_mask"].bool(),
        )

    backend: "auto", "torch" or "triton", which has a kernel for what follows the product; an
    explicit one that can't run here raises ValueError. The products are torch's, on every device.
    While something is traced or transformed, all logits are made at once, by torch.
    """
    checks.check_float("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(
            "x must have shape [batch, length, width] or, packed, [tokens, width], "
            f"got {checks.shape(x)}"
        )
    cast = tracing.autocast(x)
    checks.check_product(x, weight, bias, cast is not None, ("x", "vocabulary", "width"))
    check_layout("x", x, x.shape[:-1], key_mask, cu_seqlens, max_seqlen, None)
    if cast is not None:
        x, weight = x.to(cast), weight.to(cast)
        bias = None if bias is None else bias.to(cast)
    vocabulary = operator.index(weight.shape[0])
    backend = dispatch.choose("linear_log1p_max", backend, x.device, x.dtype, vocabulary)
    sequences = packing.sequences_of(key_mask, cu_seqlens, max_seqlen, None, x.shape[0])
    if key_mask is not None:
        x = torch.where(key_mask[..., None], x, 0)  # a masked NaN would reach sums: 0 * NaN
    given = x, weight, bias, key_mask, cu_seqlens
    if not tracing.plain_call(*given) or tracing.only_reference():
        return reference.forward(x, weight, bias, sequences)
    if any_requires_grad(x, weight, bias):
        return LinearLog1pMax.apply(x, weight, bias, sequences, backend)
    top, _ = largest_logits(x, weight, bias, sequences, backend)
    return vector(top, x.dtype)
