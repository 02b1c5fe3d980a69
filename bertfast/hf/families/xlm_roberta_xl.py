"""XLM-RoBERTa-XL: pre-norm, and the last LayerNorm is the encoder's."""

from torch import nn

from .. import bert, heads
from ..family import Family


class Layer(bert.PreNormLayer):
    def norms(self) -> tuple[nn.Module, nn.Module]:
        return self.attention.self_attn_layer_norm, self.LayerNorm


class Head(heads.Roberta):
    _moves_labels = False


FAMILY = Family(
    "XLM-RoBERTa-XL",
    "XLMRobertaXL",
    "transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl",
    bert.classes("XLMRobertaXL", layer=Layer),
    {"XLMRobertaXLForMaskedLM": Head},
    layer="pre-norm",
)
