"""Tiny saved encoders with a tokenizer of a few words: what the recipes are given."""

import json
import re
from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + list(".,:!0123456789")
TEXTS = ["a cat", "", "the dog barked at the cat all night long", "x " * 60, "hi!", "a cat"] + [
    "abc " * (number * 7 % 13 + 1) for number in range(20)
]


def save(folder: Path, kind: str = "BertModel", length: int = 32, **more: object) -> Path:
    """A model of two layers by transformers' class, with random weights that matter."""
    import transformers

    torch.manual_seed(3)
    prefix = re.split("For|Model", kind)[0]
    sizes: dict[str, object] = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    if prefix == "DistilBert":
        sizes = {"n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 64}
    else:
        sizes["intermediate_size"] = 64
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=len(WORDS),
        max_position_embeddings=length + 8,
        initializer_range=0.3,
        **sizes,
        **{"pad_token_id": 0, **more},
    )
    getattr(transformers, kind)(config).save_pretrained(folder)
    save_tokenizer(folder, length)
    return folder


def save_tokenizer(folder: Path, length: int = 32) -> None:
    """Beside a model whose padding token has the number 0."""
    import transformers

    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=length)
    tokenizer.save_pretrained(folder)


def sentence_encoder(folder: Path, *, pooling: str = "mean", dense: bool = False, **more) -> Path:
    """Saved by sentence-transformers itself."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    save(folder / "bare")
    transformer = modules.Transformer(str(folder / "bare"))
    parts = [transformer, modules.Pooling(32, pooling_mode=pooling)]
    if dense:
        parts += [modules.Dense(32, 8), modules.Normalize()]
    model = SentenceTransformer(modules=parts, device="cpu", **more)
    model.save(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


def write_json(path: Path, **told: object) -> None:
    path.write_text(json.dumps(told))
