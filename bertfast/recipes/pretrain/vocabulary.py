"""The tokenizer: WordPiece trained on the text by the tokenizers library, or one that is given."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Of "[PAD]" and so on the ids are 0 to 4.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000  # characters at most, the most frequent


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


def train(
    texts: Callable[[], Iterable[str]], size: int, *, lowercase: bool = True, progress: bool = True
) -> Any:
    """A BERT tokenizer of transformers, whose WordPiece vocabulary has exactly `size` tokens.

    The same text gives the same tokens in the same order, as the trainer alone doesn't: where two
    pieces are as frequent it goes by their ids, and it numbers characters as a hash table has them.
    So these are found and sorted in a pass before, and `texts` is called twice.
    """
    transformers = _transformers()
    alphabet = _alphabet(texts(), lowercase)
    first = [*SPECIAL, *alphabet]
    letters = [token for token in alphabet if len(token) == 1]
    if len(first) > size:
        raise ValueError(
            f"vocabulary must be {len(first)} or more for this text: it has {len(letters)} "
            f"characters, {len(alphabet) - len(letters)} of them within words too, beside "
            f"{len(SPECIAL)} special tokens; got {size}"
        )
    tokens = _trained(
        texts(),
        lowercase,
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=letters,
        limit_alphabet=max(len(letters), 1),
        special_tokens=first,
        show_progress=progress,
    )
    if len(tokens) < size:
        raise ValueError(
            f"vocabulary must be {len(tokens)} or less for this text, which has no more pieces of "
            f"words that come twice; got {size}"
        )
    return transformers.BertTokenizerFast(vocab=tokens, do_lower_case=lowercase)


def _alphabet(texts: Iterable[str], lowercase: bool) -> list[str]:
    """Characters as they are at the start of a word, and as they are within words, sorted."""
    counts: Counter[str] = Counter()

    def counted() -> Iterator[str]:
        for text in texts:
            counts.update(text)
            yield text

    found = _trained(counted(), lowercase, vocab_size=0, special_tokens=[], show_progress=False)
    normal = _normalizer(lowercase)
    frequency: Counter[str] = Counter()
    for character, count in counts.items():
        for made in normal.normalize_str(character):
            frequency[made] += count
    letters = sorted((c for c in found if len(c) == 1), key=lambda c: (-frequency[c], c))
    letters = sorted(letters[:ALPHABET])
    return letters + [f"##{letter}" for letter in letters if f"##{letter}" in found]


def _normalizer(lowercase: bool) -> Any:
    from tokenizers import normalizers

    return normalizers.BertNormalizer(lowercase=lowercase)


def _trained(texts: Iterable[str], lowercase: bool, **options: Any) -> dict[str, int]:
    """The tokens, by their ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = _normalizer(lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(_some(texts), trainers.WordPieceTrainer(**options))
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


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
