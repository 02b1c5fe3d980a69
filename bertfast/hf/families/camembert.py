"""CamemBERT."""

from .. import bert, heads
from ..family import Family

FAMILY = Family(
    "CamemBERT",
    "Camembert",
    "transformers.models.camembert.modeling_camembert",
    bert.classes("Camembert"),
    {"CamembertForMaskedLM": heads.Roberta},
)
