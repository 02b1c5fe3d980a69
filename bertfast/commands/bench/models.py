"""Encoders to measure: BERT-base, BERT-large and MiniLM with random weights, or a saved model.

Random weights need no network, and the time doesn't depend on them. All parameters are random, so
that an implementation that forgets one is found out before it is timed.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .. import saved as saved_model
from ..errors import UserError
from .lengths import MIXES


@dataclass(frozen=True)
class Model:
    name: str
    width: int
    inner: int
    layers: int
    heads: int
    directory: str | None = None  # None: random weights
    positions: int = 512  # the longest sequence
    model_type: str = "bert"  # in Hugging Face's configurations
    gated: str | None = None  # the activation of a gated MLP, `inner` wide; None: a GELU

    def build(self, device: str, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
        """The stock Hugging Face model with SDPA attention, in eval."""
        if self.directory is not None:
            from transformers import AutoModel

            model = saved_model.load(AutoModel, self.directory, attn_implementation="sdpa")
            return model.to(device, dtype).eval()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.positions,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
        with torch.device(device):
            model = BertModel(config)
        return randomized(model).to(dtype).eval()


MODELS = {
    model.name: model
    for model in (
        Model("BERT-base", 768, 3072, 12, 12),
        Model("BERT-large", 1024, 4096, 24, 16),
        Model("MiniLM-L6", 384, 1536, 6, 12),
    )
}
# Sizes of models with gated MLPs, which are tuned for and not built.
GATED = {
    model.name: model
    for model in (
        Model("ModernBERT-base", 768, 1152, 22, 12, model_type="modernbert", gated="gelu"),
        Model("ModernBERT-large", 1024, 2624, 28, 16, model_type="modernbert", gated="gelu"),
        Model("NomicBERT", 768, 3072, 12, 12, model_type="nomic_bert", gated="silu"),
    )
}


def saved(directory: str, layer: bool = False) -> Model:
    """The model that `save_pretrained` wrote into a directory. layer: one layer is measured."""
    config = saved_model.config(directory)
    inner = getattr(config, "intermediate_size", None)
    if inner is None:
        if layer:
            raise UserError(f"a {config.model_type} layer isn't measured alone: bench model does")
        inner = config.hidden_dim
    return Model(
        saved_model.name(directory),
        config.hidden_size,
        inner,
        config.num_hidden_layers,
        config.num_attention_heads,
        directory,
        saved_model.positions(config),
        config.model_type,
        saved_model.gating(config),
    )


@torch.no_grad()
def randomized(module: nn.Module) -> nn.Module:
    first, *_ = module.parameters()
    generator = torch.Generator(first.device).manual_seed(0)
    for name, parameter in module.named_parameters():
        spread, middle = 0.02, 0.0
        if parameter.ndim == 1:
            spread, middle = 0.1, float(name.endswith("LayerNorm.weight"))
        parameter.normal_(middle, spread, generator=generator)
    return module


@dataclass(frozen=True)
class Tokens:
    """A batch: its real lengths, padded to the longest; random token ids."""

    name: str
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def real(self) -> int:
        return sum(self.lengths)

    @property
    def padded(self) -> int:
        return len(self.lengths) * self.longest

    def mask(self, device: str) -> torch.Tensor:
        """(rows, length): where the real tokens are."""
        own = torch.tensor(self.lengths, device=device)[:, None]
        return torch.arange(self.longest, device=device) < own

    def cu_seqlens(self, device: str) -> torch.Tensor:
        """The first token of each sequence when they lie behind one another, and the last's end."""
        bounds = torch.tensor((0, *self.lengths)).cumsum(0)
        return bounds.to(device, torch.int32)

    def inputs(self, device: str, vocabulary: int = 30522) -> dict[str, torch.Tensor]:
        """The tensors that a tokenizer returns."""
        generator = torch.Generator().manual_seed(1)
        mask = self.mask("cpu").long()
        low = min(1000, vocabulary // 2)  # the special tokens are not in use here
        ids = torch.randint(low, vocabulary, mask.shape, generator=generator) * mask
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def full_batch(rows: int, length: int) -> Tokens:
    return Tokens(f"{rows}x{length}", (length,) * rows)


def mixed_batch(mix: str, rows: int, seed: int = 0) -> Tokens:
    """`rows` lengths of a mix. The name tells what they are padded to."""
    lengths = tuple(MIXES[mix].lengths(rows, seed))
    return Tokens(f"{mix} {rows}x{max(lengths)}", lengths)


def parse_shapes(text: str) -> list[Tokens]:
    """ "8x128,32x512" -> batches without padding."""
    batches = []
    for part in text.replace(" ", "").split(","):
        rows, times, length = part.partition("x")
        if not (times and rows.isdigit() and length.isdigit() and int(rows) and int(length)):
            raise UserError(f"--shapes must be ROWSxLENGTH, such as 32x128, got {part!r}")
        batches.append(full_batch(int(rows), int(length)))
    return batches
