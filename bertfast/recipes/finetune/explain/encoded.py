"""A text, or two, as a model is given it, and which part of the text each token stands for."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....commands.errors import UserError, one_of

TASKS = {"classify": 1, "tag": 1, "pair": 2, "qa": 2}  # and how many texts each takes
MOST_TOKENS = 512  # of a page, whatever the model can read
MOST_CUT = 300  # characters that are shown of the text that isn't read


@dataclass(frozen=True)
class Token:
    token: str  # the vocabulary's
    text: str  # what it stands for; "" where an earlier token stands for it too
    before: str  # what stands between the token before and it
    segment: int | None  # 0, 1; None for what the tokenizer adds
    begins: bool  # a word

    @property
    def special(self) -> bool:
        return self.segment is None


@dataclass(frozen=True)
class Encoded:
    inputs: dict[str, torch.Tensor]  # of one row
    baseline: torch.Tensor  # input_ids, all but the added tokens replaced by padding
    tokens: list[Token]
    rest: tuple[str, ...]  # of each text, what stands behind its last token
    cut: int  # tokens that were left out
    limit: int

    @property
    def segments(self) -> int:
        return len(self.rest)

    def __len__(self) -> int:
        return len(self.tokens)


def encode(model: nn.Module, tokenizer: Any, texts: str | Sequence[str], task: str) -> Encoded:
    one_of("task", task, TASKS)
    given = (texts,) if isinstance(texts, str) else tuple(texts)
    if len(given) != TASKS[task]:
        raise UserError(f"{task!r} explains {TASKS[task]} text(s), got {len(given)}")
    for text in given:
        if not text.strip():
            raise UserError("a text to explain must have words, got an empty one")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError("a text to explain must be Unicode, got halves of surrogate pairs")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("explaining needs a tokenizer that knows places in a text (a fast one)")
    if tokenizer.pad_token_id is None:
        raise UserError("explaining compares with padding, and the tokenizer has no pad_token")
    limit = min(_readable(model), tokenizer.model_max_length, MOST_TOKENS)
    total = len(tokenizer(*given, verbose=False)["input_ids"])
    try:
        made = tokenizer(
            *given,
            truncation="only_second" if task == "qa" else "longest_first",
            max_length=limit,
            padding=False,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
    except Exception as error:  # tokenizers has no class of its own for it
        if task == "qa" and total > limit:
            raise UserError(
                f"the question leaves no room for its context within {limit} tokens"
            ) from error
        raise
    ids = made["input_ids"]
    if ids.shape[1] > limit:
        raise UserError(f"the question leaves no room for its context within {limit} tokens")
    added = made["special_tokens_mask"].bool()
    if bool(added.all()):
        raise UserError("a text to explain must have tokens, got one of which none is left")
    tokens, rest = _tokens(given, made, tokenizer.convert_ids_to_tokens(ids[0]))
    names = inspect.signature(of_transformers(model).forward).parameters
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    inputs = {
        name: made[name].to(device)
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in made and name in names
    }
    baseline = torch.where(added, ids, tokenizer.pad_token_id).to(device)
    return Encoded(inputs, baseline, tokens, rest, total - len(tokens), limit)


def _tokens(
    texts: tuple[str, ...], made: Any, names: list[str]
) -> tuple[list[Token], tuple[str, ...]]:
    shown = [0] * len(texts)
    tokens: list[Token] = []
    offsets, segments, words = (
        made["offset_mapping"][0].tolist(),
        made.sequence_ids(),
        made.word_ids(),
    )
    for place, (name, (start, end), segment) in enumerate(
        zip(names, offsets, segments, strict=True)
    ):
        if segment is None:
            tokens.append(Token(name, "", "", None, False))
            continue
        text, done = texts[segment], shown[segment]
        start, end = max(start, done), max(end, done)
        word = (segment, words[place])
        begins = place == 0 or word != (segments[place - 1], words[place - 1])
        tokens.append(Token(name, text[start:end], text[done:start], segment, begins))
        shown[segment] = end
    return tokens, tuple(text[done:] for text, done in zip(texts, shown, strict=True))


def of_transformers(model: nn.Module) -> nn.Module:
    """The model under PEFT's wrapper, which takes any argument."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UserError(f"explaining needs a model of transformers, got {type(model).__name__}")


def _readable(model: nn.Module) -> int:
    """How many tokens it has positions for."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's positions begin behind the padding's
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return getattr(of_transformers(model).config, "max_position_embeddings", MOST_TOKENS)
