"""The batch of pre-training: sequences one after another, without padding between them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PackedBatch:
    """cu_seqlens stays on the host, where the encoder makes its plan from it."""

    input_ids: torch.Tensor  # int64 (tokens,), masked
    token_type_ids: torch.Tensor  # int64 (tokens,)
    position_ids: torch.Tensor  # int64 (tokens,), from 0 in each sequence
    cu_seqlens: torch.Tensor  # int32 (sequences + 1,)
    max_seqlen: int
    places: torch.Tensor  # int64 (labelled,): of the tokens to be predicted, ascending
    labels: torch.Tensor  # int64 (labelled,): what stood there
    not_next: torch.Tensor | None  # int64 (sequences,): 0 where segment B follows A

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def to(self, device: torch.device | str) -> "PackedBatch":
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
            and field.name != "cu_seqlens"
        }
        return dataclasses.replace(self, **moved)

    def pinned(self) -> "PackedBatch":
        """In memory of the host that a GPU can copy from while the host goes on."""
        moved: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
            and field.name != "cu_seqlens"
        }
        return dataclasses.replace(self, **moved)
