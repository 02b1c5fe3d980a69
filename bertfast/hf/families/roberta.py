"""RoBERTa."""

from .. import bert, heads
from ..family import Family

FAMILY = Family(
    "RoBERTa",
    "Roberta",
    "transformers.models.roberta.modeling_roberta",
    bert.classes("Roberta"),
    {"RobertaForMaskedLM": heads.Roberta},
)
