"""A model that calls its layers itself, without an encoder: the batch is packed before the first
one and unpacked after the last, so its forward is written out here.

Where each layer's output is asked for nothing is packed, and the original forward runs and hands
the batch down.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from ..graphs import GRAPHS, Graphs
from ..nn.modules import has_own_forward
from ..packing.batch import Batch
from . import model
from .layer import ARGUMENT


class Model(model.Model):
    """One whose layers are its `layers`."""

    def called(self) -> list[nn.Module]:
        """The layers, in whatever they are wrapped, in their order."""
        return list(self.encoder_module().children())

    def embed(self, arguments: dict) -> torch.Tensor:
        """The first layer's input, by the model's embeddings."""
        names = (*self.TOKENS, "inputs_embeds")
        return self.embeddings(**{name: arguments.get(name) for name in names})

    def told(self, x: torch.Tensor, batch: Batch) -> Iterable[tuple[nn.Module, dict]]:
        """The layers in their order, and what each is given besides x, the mask and the batch."""
        raise NotImplementedError

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """The output of what comes after the last layer, on each token alone: of `finishers`."""
        return x

    def finishers(self) -> list[nn.Module]:
        return []

    def outputs(self, hidden: torch.Tensor) -> Any:
        if not hasattr(self, "pooler"):
            return BaseModelOutput(last_hidden_state=hidden)
        pooled = None if self.pooler is None else self.pooler(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def encoder_module(self) -> nn.Module:
        return self.layers

    def encoder_layers(self) -> list[Any]:
        return [model.unwrapped(one) for one in self.called()]

    def surroundings(self, layers: list[Any]) -> tuple[list[nn.Module], ...]:
        return [], self.finishers()

    def why_untold(self) -> str | None:
        return model.why_untold("layer", self.encoder_layers())

    def _shows_layers(self, arguments: dict) -> bool:
        asked = self.asked(arguments, "output_hidden_states")
        return asked is not None and asked is not False  # some versions take numbers of layers

    def _why_original(self, arguments: dict, facts: Any) -> str | None:
        if not has_own_forward(self._original):
            return f"the forward of {self._original.__name__} was replaced"
        if arguments.get("input_ids") is not None and arguments.get("inputs_embeds") is not None:
            return ""  # the original has an error for it
        return super()._why_original(arguments, facts)

    def call(self, arguments: dict) -> Any:
        batch = arguments.get(ARGUMENT)
        if batch is None or self._shows_layers(arguments):
            return super().call(arguments)
        x = self.embed(arguments)
        if batch.padded_shape is not None and x.shape[:2] == batch.padded_shape:
            x = batch.pack(x)
        graphs, y = self.graphs_of_layers(), None
        if batch.bucket is not None and graphs is not None:
            y = graphs.serve(x, batch, self.run, model.finish(batch))
        if y is None:
            y = self.run(x, batch)
            if batch.padded_shape is not None:
                y = batch.on(y.device).unpack(y)
        outputs = self.outputs(y)
        return outputs if self.asked(arguments, "return_dict") else outputs.to_tuple()

    def run(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The layers, and what comes after the last."""
        for one, given in self.told(x, batch):
            x = one(x, attention_mask=None, **given, **{ARGUMENT: batch})
        return self.finish(x)

    def graphs_of_layers(self) -> Graphs | None:
        return self.__dict__.get(GRAPHS)

    def width(self) -> int:
        """Of the tokens, for graphs."""
        return model.width_of(self.encoder_layers())
