"""A folder of prepared text made of token ids, without a tokenizer."""

import numpy as np

from bertfast.recipes.pretrain import shards
from bertfast.recipes.pretrain.shards import Shards, ShardWriter

PAD, UNK, CLS, SEP, MASK = range(5)
RESERVED = 5
VOCABULARY = 60_000


def documents(count, sentences=(1, 12), length=(1, 30), seed=0):
    """Lists of sentences, each a list of ids; each id stands once in all documents."""
    rng = np.random.default_rng(seed)
    ids = iter(range(RESERVED, VOCABULARY))
    return [
        [
            [next(ids) for _ in range(rng.integers(*length, endpoint=True))]
            for _ in range(rng.integers(*sentences, endpoint=True))
        ]
        for _ in range(count)
    ]


def write(folder, train, held_out=(), *, shard=10, continues=None):
    """shard: documents of each."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": [], "held-out": []}
    for split, texts in (("train", train), ("held-out", held_out)):
        for start in range(0, len(texts), shard):
            name = f"{split}-{start // shard:05d}"
            writer = ShardWriter(folder, name, shards.token_type(VOCABULARY))
            for text in texts[start : start + shard]:
                writer.add(np.concatenate(text), np.array([len(sentence) for sentence in text]))
            splits[split].append(writer.close())
    files = {}
    if continues is not None:
        data = np.asarray(continues, np.uint8).tobytes()
        shards.write_aside(folder / shards.CONTINUES, data)
        files[shards.CONTINUES] = shards.described(data)
    index = {
        "format": shards.FORMAT,
        "version": shards.VERSION,
        "vocabulary": VOCABULARY,
        "special": {"pad": PAD, "unk": UNK, "cls": CLS, "sep": SEP, "mask": MASK},
        "reserved": list(range(RESERVED)),
        "block": shards.BLOCK,
        "files": files,
        "splits": splits,
    }
    index["checksum"] = shards.checksum(index)
    shards.write_json(folder / shards.INDEX, index)
    return Shards(folder)
