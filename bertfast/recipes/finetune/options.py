"""Options of fine-tuning, each a flag. None: the task, the model or the machine decides."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...commands.errors import UserError
from ..pretrain.options import DEVICES, as_json, check, flag

TASKS = ("classify", "tag", "qa", "pair")
ADAPTERS = ("lora", "adalora", "ia3", "prefix")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# Adam's highest rate for all weights, and for adapters, which begin at nothing.
RATES = {None: 5e-5, "lora": 5e-4, "adalora": 2e-3, "ia3": 8e-3, "prefix": 1e-2}


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


def _free(default: Any, help: str, **more: Any) -> Any:
    """An option that may change between the parts of a run."""
    return _option(default, help, free=True, **more)


@dataclass(frozen=True)
class FinetuneOptions:
    """Trains a saved encoder on a table of labelled texts; predicts, and explains, by one.

    --data trains, or goes on with a run that was stopped. --predict and --explain use the model
    that was trained, or without --data the one of --model."""

    model: Path = _option(dataclasses.MISSING, "Folder saved by transformers or by this command.")
    out: Path = _free(
        *(dataclasses.MISSING, "Folder of the run; of --predict and --explain alone, also a file.")
    )
    task: str | None = _option(
        *(None, "classify texts, tag words, answer questions, or compare a pair of texts."),
        known=TASKS,
    )
    data: Path | None = _free(
        None, "CSV, TSV, JSON lines, Parquet, CoNLL or SQuAD's JSON; or a folder of train.* etc."
    )
    validation: Path | None = _free(None, "Likewise. Default: a part of --data.")
    held_out: float = _option(0.1, "That part's share, stratified by label.", above=0, below=1)
    predict: Path | None = _free(None, "File whose rows are predicted.")
    explain: str | None = _free(None, "Text (of qa the question) that a page explains.")
    explain_with: str | None = _free(None, "Its second text, or of qa the context.")
    # Columns
    text: str | None = _option(None, "Column of texts, of the words to tag, of a pair's first.")
    second: str | None = _option(None, "Column of a pair's second texts.")
    label: str | None = _option(None, "Column of labels, scores or tags.")
    question: str | None = _option(None, "Column of questions.")
    context: str | None = _option(None, "Column of the texts that hold the answers.")
    answer: str | None = _option(None, "Column of answers; their places are answer_start's.")
    id: str | None = _free(None, "Column that goes along with predictions.")
    scores: bool | None = _option(None, "Of a pair: labels are numbers to predict. Default: seen.")
    header: bool = _option(True, "Line 1 of CSV and TSV names columns; else they are 1, 2, ...")
    quotes: bool = _option(True, 'In CSV and TSV "..." encloses a cell; else it is text.')
    skip_bad: bool = _option(False, "Leave out rows that are wrong, and list them.")
    # Texts
    length: int | None = _option(None, "Most tokens of an input. Default: the model's.", least=8)
    stride: int | None = _option(
        *(None, "Tokens that windows of a long text share (tag, qa). Default: it is cut."), least=0
    )
    # Training
    epochs: int = _option(3, "Passes over the data.", least=1)
    batch: int = _option(32, "Texts of a step, of like lengths.", least=1)
    tokens: int | None = _option(None, "Most tokens of a step, instead of --batch.", least=8)
    accumulate: int = _option(1, "Batches that make up a step.", least=1)
    lr: float | None = _option(None, "Highest rate. Default: 5e-5; of adapters more.", above=0)
    warmup: float = _option(0.1, "Share of the steps in which it rises.", least=0, below=1)
    weight_decay: float = _option(0.01, "Not of biases and LayerNorm.", least=0)
    dropout: float | None = _option(None, "Default: the model's.", least=0, below=1)
    class_weights: bool = _option(False, "Rare labels count more, inversely to their number.")
    every: int | None = _option(
        None, "Steps between evaluations, with a checkpoint each. Default: an epoch's.", least=1
    )
    patience: int | None = _option(
        None, "Stop after so many evaluations without a better one.", least=1
    )
    metric: str | None = _option(None, "What is better. Default: the task's first figure.")
    peft: str | None = _option(None, "Train an adapter only.", known=ADAPTERS)
    rank: int = _option(8, "Of LoRA and AdaLoRA; of prefix, its tokens.", least=1)
    merge: bool = _free(False, "Add the adapter to the weights that are saved.")
    seed: int = _option(0, "Of the new head, the data's order, dropout and the held-out part.")
    precision: str = _option("auto", "auto: bf16 on a GPU that has it.", known=PRECISIONS)
    device: str = _free("auto", "auto: a GPU where there is one.", known=DEVICES)
    convert: bool = _free(True, "Run on bertfast; else the model's original code.")
    overwrite: bool = _free(False, "Replace what an earlier run has made.")

    def __post_init__(self) -> None:
        check(self)
        if self.data is None and self.predict is None and self.explain is None:
            raise UserError("nothing to do: give --data, --predict or --explain")
        if self.task is None and self.data is not None:
            raise UserError(f"--task must be one of {', '.join(TASKS)}")
        if self.merge and self.peft is None:
            raise UserError("--merge needs an adapter to merge: give --peft")
        if self.merge and self.peft == "prefix":
            raise UserError("--merge: a prefix can't be added to weights; it is saved beside them")
        for name, tasks in _ONLY.items():
            given = getattr(self, name) not in (None, False)
            if given and self.task is not None and self.task not in tasks:
                raise UserError(f"{flag(name)} is for {' and '.join(tasks)}, not for {self.task}")
        if self.explain_with is not None and self.explain is None:
            raise UserError("--explain-with needs --explain")

    @property
    def rate(self) -> float:
        return RATES[self.peft] if self.lr is None else self.lr

    def fixed(self) -> dict[str, Any]:
        """Those that a run keeps from its beginning to its end."""
        free = {option.name for option in dataclasses.fields(self) if "free" in option.metadata}
        return {name: value for name, value in as_json(self).items() if name not in free}


# Option -> the tasks that it means something to.
_ONLY = {
    **{"text": ("classify", "tag", "pair"), "second": ("pair",)},
    **{"label": ("classify", "tag", "pair"), "scores": ("pair",)},
    **{name: ("qa",) for name in ("question", "context", "answer")},
    **{"stride": ("tag", "qa"), "class_weights": ("classify", "tag", "pair")},
    "explain_with": ("pair", "qa"),
}
