"""The model of pre-training: a packed batch in, sums of losses and of right answers out.

`Pretraining` wraps transformers' BertForPreTraining (MLM and NSP) or BertForMaskedLM. Its encoder
runs converted, on packed tokens. Only the tokens that are to be predicted reach the vocabulary, by
`bertfast.ops.linear_cross_entropy`, so that no logits of a batch exist.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import bertfast

from ...commands.errors import UserError
from ...ops import linear_cross_entropy
from .packed import PackedBatch

# Layers, width and heads of each size, with 4 x width inside the MLP.
SIZES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
# Labelled tokens of which the MLM accuracy is taken, as their logits have to be made for it.
SAMPLE = 512


class Sums(NamedTuple):
    """Over a micro-batch. A tuple of tensors, as FSDP2 looks for tensors in a module's output."""

    mlm: torch.Tensor
    nsp: torch.Tensor  # zero without NSP
    nsp_right: torch.Tensor  # sequences, without a gradient
    mlm_right: torch.Tensor  # of the first `sample` labelled tokens, without a gradient


class Pretraining(nn.Module):
    """forward(batch, sample): the summed losses of a packed batch."""

    def __init__(self, model: nn.Module, recompute: bool = False, backend: str = "auto") -> None:
        """model: BertForPreTraining or BertForMaskedLM, which is converted in place."""
        super().__init__()
        self.model: Any = bertfast.optimize(
            model, backend=backend, recompute=recompute, strict=True
        )
        self.nsp = hasattr(self.model.cls, "seq_relationship")

    def forward(self, batch: PackedBatch, sample: int = 0) -> Sums:
        """sample: of how many labelled tokens the right answers are counted."""
        model = self.model
        hidden = model.bert(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            token_type_ids=batch.token_type_ids[None],
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        ).last_hidden_state[0]
        head = model.cls.predictions
        # index_select: places differ, so its gradient adds each row once, in any order.
        rows = head.transform(hidden.index_select(0, batch.places))
        weight, bias = head.decoder.weight, head.decoder.bias
        mlm = linear_cross_entropy(
            rows, weight, batch.labels, bias=bias, reduction="sum", labelled=len(batch.labels)
        )
        mlm_right = _right(rows, weight, bias, batch.labels, sample)
        nsp = nsp_right = mlm.new_zeros(())
        if self.nsp:
            firsts = batch.cu_seqlens[:-1].to(hidden.device, torch.int64, non_blocking=True)
            pooler, not_next = model.bert.pooler, batch.not_next
            assert not_next is not None, "a batch without pairs reached a model with NSP"
            pooled = pooler.activation(pooler.dense(hidden.index_select(0, firsts)))
            scores = model.cls.seq_relationship(pooled).float()
            nsp = F.cross_entropy(scores, not_next, reduction="sum")
            nsp_right = (scores.detach().argmax(1) == not_next).sum()
        return Sums(mlm, nsp, nsp_right, mlm_right)


@torch.compiler.disable
@torch.no_grad()
def _right(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    sample: int,
) -> torch.Tensor:
    """How many of the first `sample` rows have their label as the largest logit; some at a time. A
    compiler would make a form for each number."""
    rows, labels = rows[:sample], labels[:sample]
    right = torch.zeros((), dtype=torch.int64, device=rows.device)
    for first in range(0, len(rows), SAMPLE):
        part = slice(first, first + SAMPLE)
        logits = F.linear(rows[part], weight.to(rows.dtype), bias.to(rows.dtype))
        right += (logits.argmax(1) == labels[part]).sum()
    return right


def configuration(
    *,
    size: str,
    layers: int | None,
    width: int | None,
    heads: int | None,
    inner: int | None,
    vocabulary: int,
    length: int,
    dropout: float,
    pad: int,
) -> Any:
    """The BertConfig of a new model: of a size by its name, and what replaces its numbers."""
    from transformers import BertConfig

    preset = SIZES[size]
    layers, width, heads = layers or preset[0], width or preset[1], heads or preset[2]
    if width % heads:
        raise UserError(f"--width must be a multiple of --heads ({heads}), got {width}")
    return BertConfig(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=inner or 4 * width,
        max_position_embeddings=length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=pad,
    )


def new(config: Any, nsp: bool) -> nn.Module:
    """A model with random weights, drawn from torch's generator."""
    from transformers import BertForMaskedLM, BertForPreTraining

    return BertForPreTraining(config) if nsp else BertForMaskedLM(config)


def load(folder: Path, nsp: bool) -> tuple[nn.Module, list[str]]:
    """A saved model to go on from, and the weights that it didn't have, which are random."""
    from transformers import AutoConfig, BertForMaskedLM, BertForPreTraining
    from transformers.utils import logging

    if not (folder / "config.json").is_file():
        raise UserError(f"--model must be a folder with a config.json, got {str(folder)!r}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type != "bert":
            raise UserError(
                f"--model must be a model of type 'bert', got one of type {config.model_type!r} "
                f"in {str(folder)!r}"
            )
        kind: Any = BertForPreTraining if nsp else BertForMaskedLM
        model, told = kind.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        return model, sorted(told["missing_keys"])
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"--model: {str(folder)!r} can't be loaded: {type(error).__name__}: {first}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def check_fits(config: Any, vocabulary: int, length: int, nsp: bool) -> None:
    """Raises UserError where the data's tokens or lengths are beyond the model's."""
    if config.vocab_size < vocabulary:
        raise UserError(
            f"the tokenizer doesn't fit the model: it has {vocabulary} tokens, and the model "
            f"embeddings for {config.vocab_size}"
        )
    if config.max_position_embeddings < length:
        raise UserError(
            f"--length must be {config.max_position_embeddings} or less, which is how many "
            f"positions the model has, got {length}"
        )
    if nsp and config.type_vocab_size < 2:
        raise UserError(
            f"pairs of segments need a model with 2 token types, and it has "
            f"{config.type_vocab_size}: leave NSP out by --no-nsp"
        )
