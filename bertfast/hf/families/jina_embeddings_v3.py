"""Jina-v3, as transformers has it."""

from .. import heads, jina, rotary
from ..family import Family

FAMILY = Family(
    "Jina-v3",
    "JinaEmbeddingsV3",
    "transformers.models.jina_embeddings_v3.modeling_jina_embeddings_v3",
    jina.classes("JinaEmbeddingsV3"),
    {"JinaEmbeddingsV3ForMaskedLM": heads.Roberta},
    layer="post-norm, rotary",
    original=rotary.ORIGINAL,
)
