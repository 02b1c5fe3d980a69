"""Data2VecText."""

from .. import bert, heads
from ..family import Family

FAMILY = Family(
    "Data2VecText",
    "Data2VecText",
    "transformers.models.data2vec.modeling_data2vec_text",
    bert.classes("Data2VecText"),
    {"Data2VecTextForMaskedLM": heads.Roberta},
)
