"""XLM-RoBERTa."""

from .. import bert, heads
from ..family import Family

FAMILY = Family(
    "XLM-RoBERTa",
    "XLMRoberta",
    "transformers.models.xlm_roberta.modeling_xlm_roberta",
    bert.classes("XLMRoberta"),
    {"XLMRobertaForMaskedLM": heads.Roberta},
)
