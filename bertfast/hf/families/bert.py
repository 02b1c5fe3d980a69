"""BERT."""

from .. import bert, heads
from ..family import Family

FAMILY = Family(
    "BERT",
    "Bert",
    "transformers.models.bert.modeling_bert",
    bert.classes("Bert"),
    {"BertForMaskedLM": heads.Bert, "BertForPreTraining": heads.BertPreTraining},
)
