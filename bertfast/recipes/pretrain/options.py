"""Options of pre-training: each is a flag of a command and a key of the configuration file.

A field's `help` is its flag's; None means that the recipe, the size or the machine decides.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...commands.errors import UserError, one_of
from . import optimizers
from .model import SIZES


class Recipe(NamedTuple):
    """The settings of a recipe; a flag replaces one."""

    masked_share: float
    nsp: bool
    optimizer: str
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    schedule: str
    dropout: float


# bert-2018: Devlin et al., arXiv 1810.04805. modern: ModernBERT, arXiv 2412.13663, whose masking is
# 80 % [MASK], 10 % random, 10 % as it was, too, and whose dropout is none in most places.
RECIPES = {
    "bert-2018": Recipe(0.15, True, "adamw", 1e-4, (0.9, 0.999), 0.01, "linear", 0.1),
    "modern": Recipe(0.30, False, "stable-adamw", 8e-4, (0.9, 0.98), 1e-5, "wsd", 0.0),
}
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
# The share of labelled tokens in evaluation, whatever the recipe, so that losses can be compared.
EVALUATED_SHARE = 0.15
# Tokens of its batches: masks are drawn for a batch, so losses are the same for the same budget.
EVALUATED_TOKENS = 8192


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


def _choice(default: Any, known: Any, help: str) -> Any:
    return _option(default, help, known=tuple(known))


def _free(default: Any, help: str, **more: Any) -> Any:
    """An option that may change between the parts of a run: it doesn't change what is computed in
    a step, or is meant to be changed."""
    return _option(default, help, free=True, **more)


@dataclass(frozen=True)
class PrepareOptions:
    """Text to a tokenizer and to memory-mapped tokens; called again, it goes on."""

    texts: list[Path] = _option(
        dataclasses.MISSING,
        "Files or folders of text, JSON lines or Parquet, or saved Hugging Face datasets.",
        argument=True,
    )
    data: Path = _option(Path("data"), "Folder to write.")
    tokenizer: Path | None = _option(None, "Folder with one; default: WordPiece, of the text.")
    vocabulary: int = _option(30522, "Tokens of the WordPiece that is made.", least=1)
    lowercase: bool = _option(True, "The WordPiece that is made knows small letters only.")
    whole_files: bool = _option(False, "A text file is one document; else empty lines end them.")
    column: str = _option("text", "Of JSON lines, Parquet and datasets: which holds the text.")
    held_out: float = _option(0.01, "Share of documents kept for evaluation.", least=0, below=1)
    seed: int = _option(0, "Of their draw.", least=0)
    overwrite: bool = _option(False, "Replace what was made of other texts or options.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class TrainOptions:
    """Trains a model on prepared text, or goes on with a run that was stopped."""

    data: Path = _free(Path("data"), "Folder that `prepare` has made.")
    out: Path = _free(Path("run"), "Folder of the run: checkpoints, figures, the model.")
    recipe: str = _choice("bert-2018", RECIPES, "What the other options are by default.")
    # The model
    model: Path | None = _free(None, "Saved BERT model to go on from, instead of a new one.")
    size: str = _choice("base", SIZES, "Of a new model.")
    layers: int | None = _option(None, "Of a new model, instead of the size's.", least=1)
    width: int | None = _option(None, "Likewise.", least=1)
    heads: int | None = _option(None, "Likewise.", least=1)
    inner: int | None = _option(None, "Width inside the MLP; default: 4 x width.", least=1)
    dropout: float | None = _option(None, "Of a new model.", least=0, below=1)
    # The data
    length: int = _option(512, "Longest sequence, special tokens included.", least=8)
    tokens: int = _option(8192, "Tokens of a micro-batch, at most.", least=8)
    micro_batches: int = _option(16, "Micro-batches of a step, of all processes.", least=1)
    nsp: bool | None = _option(None, "Pairs of segments and next-sentence prediction.")
    masked_share: float | None = _option(
        None, "Share of tokens that are predicted.", above=0, below=1
    )
    whole_words: bool = _option(False, "Mask all pieces of a word together.")
    # The steps
    steps: int = _free(10_000, "When training ends.", least=1)
    optimizer: str | None = _choice(None, optimizers.NAMES, "muon: for the layers' matrices.")
    lr: float | None = _option(None, "Highest learning rate.", above=0)
    weight_decay: float | None = _option(None, "Not of biases and LayerNorm.", least=0)
    clip: float = _option(1.0, "Largest norm of a step's gradient; 0: any.", least=0)
    schedule: str | None = _choice(
        None, optimizers.SCHEDULES, "After the warm-up; wsd: level, then down."
    )
    warmup: int | None = _option(None, "Steps; default: 1 % of all.", least=0)
    decay: int | None = _option(None, "Steps of wsd's end; default: 10 % of all.", least=0)
    seed: int = _option(0, "Of weights, data order, masking and dropout.", least=0)
    # The machine
    precision: str = _choice("auto", PRECISIONS, "auto: bf16 on a GPU that has it, else fp32.")
    device: str = _free("auto", "auto: a GPU where there is one.", known=DEVICES)
    fsdp: bool = _free(False, "Shard the model by FSDP2; otherwise DDP.")
    recompute: bool = _free(False, "Save less for the backward, on a GPU.")
    compile: bool = _free(
        False, "Trace the model by torch.compile: bertfast's ops stay as they are."
    )
    # The run
    checkpoint_every: int = _free(500, "Steps between checkpoints.", least=1)
    keep: int = _free(2, "Checkpoints that are kept.", least=1)
    print_every: int = _free(10, "Steps between lines of figures.", least=1)
    evaluate_every: int = _free(0, "Steps between evaluations; 0: at the end.", least=0)

    def __post_init__(self) -> None:
        check(self)

    def resolved(self) -> "TrainOptions":
        """With the recipe's settings where none was given."""
        recipe = RECIPES[self.recipe]
        missing = {
            name: value
            for name, value in recipe._asdict().items()
            if name != "betas" and getattr(self, name) is None
        }
        missing["warmup"] = self.steps // 100 if self.warmup is None else self.warmup
        missing["decay"] = self.steps // 10 if self.decay is None else self.decay
        return dataclasses.replace(self, **missing)


@dataclass(frozen=True)
class EvaluateOptions:
    """Losses and accuracies of a model on the documents that were kept from training."""

    data: Path = _option(Path("data"), "Folder that `prepare` has made.")
    model: Path = _option(Path("run/model"), "Folder of the model.")
    length: int = _option(512, "Longest sequence, special tokens included.", least=8)
    tokens: int = _option(EVALUATED_TOKENS, "Tokens of a batch, at most.", least=8)
    masked_share: float = _option(EVALUATED_SHARE, "Tokens that are predicted.", above=0, below=1)
    nsp: bool | None = _option(None, "Default: if the model has a head for it.")
    seed: int = _option(0, "Of masking and pairs.", least=0)
    precision: str = _choice("auto", PRECISIONS, "auto: bf16 on a GPU that has it, else fp32.")
    device: str = _choice("auto", DEVICES, "Where it runs.")

    def __post_init__(self) -> None:
        check(self)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(options: Any) -> None:
    """Raises UserError for a value that isn't in an option's range."""
    for option in dataclasses.fields(options):
        value, about = getattr(options, option.name), option.metadata
        if value is None:
            continue
        name = flag(option.name)
        if "known" in about:
            one_of(name, value, about["known"])
        for word, wrong in (
            ("least", lambda v, limit: v < limit),
            ("above", lambda v, limit: v <= limit),
            ("below", lambda v, limit: v >= limit),
        ):
            if word in about and wrong(value, about[word]):
                said = "at least" if word == "least" else word
                raise UserError(f"{name} must be {said} {about[word]}, got {value}")


def fixed(options: TrainOptions) -> dict[str, Any]:
    """Those that a run keeps from its beginning to its end."""
    return {
        option.name: getattr(options, option.name)
        for option in dataclasses.fields(options)
        if not option.metadata.get("free")
    }


def as_json(options: Any) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
    }


def check_same(before: dict[str, Any], now: TrainOptions) -> None:
    """Raises UserError where a run was begun with other options than it shall go on with. warmup
    and decay, where they follow from the number of steps, may change with it."""
    for name, value in fixed(now).items():
        if name in before and before[name] != value:
            raise UserError(
                f"{flag(name)} was {before[name]} when the run in {str(now.out)!r} began, and is "
                f"{value} now: go on with {before[name]}, or begin another run by --out"
            )
