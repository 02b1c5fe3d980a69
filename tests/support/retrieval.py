"""Tiny models of sentence-transformers in training, and the two passes of its cached losses."""

from pathlib import Path
from typing import Any

import torch

from . import encoders
from .hf_models import tiny

QUERIES = [" ".join("abcdefgh"[n : n + 1 + n % 3]) for n in range(8)]
PASSAGES = [f"{query} {'xyz ' * (n * 3 % 7)}." for n, query in enumerate(QUERIES)]
SAME_LENGTH = [f"{letter} b c" for letter in "abcdefgh"]
LABELS = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
OFF = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def bi_encoder(folder: Path, **config: object) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(encoders.save(folder, **config)), device="cpu")


def reranker(folder: Path, **config: object) -> Any:
    from sentence_transformers import CrossEncoder

    kind = "BertForSequenceClassification"
    return CrossEncoder(str(encoders.save(folder, kind, num_labels=1, **config)), device="cpu")


def splade(folder: Path, name: str = "BertForMaskedLM", **config: object) -> Any:
    """A sparse encoder by a head of a masked language model."""
    from sentence_transformers import SparseEncoder

    tiny(name, pad_token_id=0, **config).save_pretrained(folder)
    encoders.save_tokenizer(folder)
    return SparseEncoder(str(folder), device="cpu")


def features(model: Any, *columns: list[str]) -> list[dict[str, torch.Tensor]]:
    from sentence_transformers.util import batch_to_device

    return [batch_to_device(model.preprocess(column), model.device) for column in columns]


def both_passes(model: Any, loss: Any, inputs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The embeddings or scores of each mini-batch: in the pass without gradients, and in the one
    with them, which the backward makes."""
    found: dict[bool, list[torch.Tensor]] = {False: [], True: []}

    def keep(module: Any, arguments: tuple, output: dict[str, torch.Tensor]) -> None:
        values = output.get("sentence_embedding", output.get("scores"))
        found[torch.is_grad_enabled()].append(values.detach().clone())

    with model.register_forward_hook(keep):
        loss(inputs, None).backward()
    assert len(found[False]) > 2
    return list(zip(found[False], found[True], strict=True))


def same_bits(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return all(torch.equal(first, second) for first, second in pairs)


def draws_one_more(model: Any) -> Any:
    """A fault: in the pass with gradients, and in that alone, somebody draws a number before."""

    def draw(module: Any, arguments: tuple) -> None:
        if torch.is_grad_enabled():
            torch.rand(1, device=model.device)

    return model.register_forward_pre_hook(draw)
