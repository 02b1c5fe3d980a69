"""ELECTRA. Its head of a masked language model is the generator's: the discriminator, which is
pre-trained beside it, has no vocabulary."""

from collections.abc import Callable
from typing import Any

import torch

from .. import bert, heads
from ..family import Family


class Head(heads.Head):
    _containers = ()

    @classmethod
    def of_family(cls, family: Any, prefix: str) -> dict[str, Any]:
        return {"_own": (family.ElectraGeneratorPredictions,)}

    def transform(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
        return (self.generator_predictions,)

    def vocabulary(self) -> Any:
        return self.generator_lm_head


FAMILY = Family(
    "ELECTRA",
    "Electra",
    "transformers.models.electra.modeling_electra",
    bert.classes("Electra"),
    {"ElectraForMaskedLM": Head},
)
