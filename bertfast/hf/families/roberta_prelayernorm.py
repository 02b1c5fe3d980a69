"""RoBERTa-PreLayerNorm."""

from torch import nn

from .. import bert, heads
from ..family import Family


class Layer(bert.PreNormLayer):
    def norms(self) -> tuple[nn.Module, nn.Module]:
        return self.attention.LayerNorm, self.intermediate.LayerNorm


FAMILY = Family(
    "RoBERTa-PreLayerNorm",
    "RobertaPreLayerNorm",
    "transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm",
    bert.classes("RobertaPreLayerNorm", layer=Layer),
    {"RobertaPreLayerNormForMaskedLM": heads.Roberta},
    layer="pre-norm",
)
