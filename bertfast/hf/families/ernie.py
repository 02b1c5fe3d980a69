"""ERNIE: BERT, which may be told of each token what task it is for."""

from .. import bert, heads
from ..family import Family


class Model(bert.Model):
    TOKENS = (*bert.Model.TOKENS, "task_type_ids")


FAMILY = Family(
    "ERNIE",
    "Ernie",
    "transformers.models.ernie.modeling_ernie",
    bert.classes("Ernie", whole=Model),
    {"ErnieForMaskedLM": heads.Bert, "ErnieForPreTraining": heads.BertPreTraining},
)
