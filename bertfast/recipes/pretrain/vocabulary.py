"""The tokenizer: WordPiece trained on the text by the tokenizers library, or one that is given."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000  # characters, the most frequent; BERT's number


class Vocabulary(NamedTuple):
    """Of a tokenizer, as far as batches need it."""

    size: int
    special: dict[str, int]  # pad, unk, cls, sep, mask
    reserved: list[int]  # special tokens, and ids without a token
    continues: list[bool] | None  # of each token; None unless it is WordPiece's


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "preparing text needs transformers: pip install bertfast[train]"
        ) from error
    return transformers


def train(texts: Iterable[str], size: int, *, lowercase: bool = True, progress: bool = True) -> Any:
    """A BERT tokenizer of transformers, whose WordPiece vocabulary has exactly `size` tokens."""
    transformers = _transformers()
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        limit_alphabet=ALPHABET,
        special_tokens=list(SPECIAL),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(_some(texts), trainer)
    vocabulary = tokenizer.get_vocab()
    letters = sum(len(token.removeprefix("##")) == 1 for token in vocabulary)
    if len(vocabulary) > size:
        raise ValueError(
            f"vocabulary must be {len(vocabulary)} or more for this text, which has {letters} "
            f"characters (as a word's first and as one of the others) beside {len(SPECIAL)} "
            f"special tokens, got {size}"
        )
    if len(vocabulary) < size:
        raise ValueError(
            f"vocabulary must be {len(vocabulary)} or less for this text, which has no more pieces "
            f"of words that come twice, got {size}"
        )
    return transformers.BertTokenizerFast(vocab=vocabulary, do_lower_case=lowercase)


def _some(texts: Iterable[str]) -> Iterator[list[str]]:
    """In lists, which is faster to hand over."""
    held: list[str] = []
    for text in texts:
        held.append(text)
        if len(held) == 256:
            yield held
            held = []
    yield held


def load(folder: str | Path) -> Any:
    """A fast tokenizer of transformers, from a folder (or, by name, from the hub)."""
    transformers = _transformers()
    if not (folder_path := Path(folder)).exists() and folder_path.is_absolute():
        raise FileNotFoundError(f"{folder}, of tokenizer, doesn't exist")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"tokenizer must be a folder with one, got {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer must be a fast one (with tokenizer.json), got {folder}")
    missing = [
        name
        for name in ("pad", "cls", "sep", "mask")
        if getattr(tokenizer, f"{name}_token_id") is None
    ]
    if missing:
        raise ValueError(
            f"tokenizer must have the special tokens pad, cls, sep and mask, got {folder} without "
            f"{', '.join(missing)}"
        )
    return tokenizer


def describe(tokenizer: Any) -> Vocabulary:
    ids = tokenizer.get_vocab()
    size = max(ids.values()) + 1
    special = {
        name: number
        for name in ("pad", "unk", "cls", "sep", "mask")
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    reserved = sorted({*tokenizer.all_special_ids, *(set(range(size)) - set(ids.values()))})
    model = tokenizer.backend_tokenizer.model
    prefix = getattr(model, "continuing_subword_prefix", None)
    continues = None
    if type(model).__name__ == "WordPiece" and prefix:
        continues = [False] * size
        for token, number in ids.items():
            continues[number] = token.startswith(prefix) and token != prefix
    return Vocabulary(size, special, reserved, continues)


def encoder(tokenizer: Any) -> Any:
    """The tokenizers library's, for text alone: nothing is cut, filled up or added, and "[SEP]" in
    a text is a word as others."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    return made
