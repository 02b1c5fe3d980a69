"""Options of the command, each a flag."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pretrain.options import check
from .encoders import POOLINGS, PRECISIONS
from .output import FORMATS


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class EmbedOptions:
    """Vectors of a file's or folder's texts, or scores of its pairs, in shards; called again, it
    goes on."""

    input: Path = _option(
        *(dataclasses.MISSING, "Parquet, CSV, TSV, JSON lines or text, or a folder of such."),
        argument=True,
    )
    output: Path = _option(dataclasses.MISSING, "Folder to write shards to.", argument=True)
    model: Path = _option(
        dataclasses.MISSING, "Folder saved by sentence-transformers or transformers."
    )
    column: str = _option("text", "Which holds the texts; a text file has lines.")
    pair: str | None = _option(
        None, "Column of second texts: scores of pairs, by a cross-encoder, in place of vectors."
    )
    id: str | None = _option(None, "Column that goes along; rows are numbered anyway.")
    format: str = _option("parquet", "Of shards; npy: with ids beside.", known=FORMATS)
    shard: int = _option(8192, "Rows of a shard, which are sorted by length together.", least=1)
    pooling: str | None = _option(
        None, "Default: as the model's folder says, or mean.", known=POOLINGS
    )
    normalize: bool | None = _option(None, "To length 1. Default: as the model's folder says.")
    prompt: str | None = _option(None, "Put before each text.")
    prompt_name: str | None = _option(None, "One of those of the model's folder.")
    length: int | None = _option(
        None, "Most tokens of a text, or pair. Default: the model's.", least=1
    )
    tokens: int = _option(8192, "Most tokens of a batch.", least=1)
    device: str = _option("auto", "auto: a GPU where there is one.")
    precision: str = _option("auto", "auto: fp16 on a GPU, else fp32.", known=PRECISIONS)
    ray: str | None = _option(
        None, "Run on Ray: here, or on the cluster at an address (auto, HOST:PORT)."
    )
    workers: int | None = _option(
        None, "Ray's actors. Default: one for each GPU, or else each CPU.", least=1
    )
    skip_bad: bool = _option(
        False, "Leave bad rows out, and list them in _skipped.jsonl. Default: the first ends it."
    )
    overwrite: bool = _option(False, "Replace what was made of something else.")

    def __post_init__(self) -> None:
        check(self)
