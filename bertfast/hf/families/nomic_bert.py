"""NomicBERT, as transformers has it: Jina-v3's layer with a gated MLP, its products without
biases."""

from .. import heads, jina, rotary
from ..family import Family

FAMILY = Family(
    "NomicBERT",
    "NomicBert",
    "transformers.models.nomic_bert.modeling_nomic_bert",
    jina.classes("NomicBert"),
    {"NomicBertForMaskedLM": heads.Bert},
    layer="post-norm, rotary, gated",
    original=rotary.ORIGINAL,
)
