"""GTE, as transformers has it: Jina-v3's layer with a gated MLP."""

from .. import heads, jina, rotary
from ..family import Family

FAMILY = Family(
    "GTE",
    "Gte",
    "transformers.models.gte.modeling_gte",
    jina.classes("Gte"),
    {"GteForMaskedLM": heads.Roberta},
    layer="post-norm, rotary, gated",
    original=rotary.ORIGINAL,
)
