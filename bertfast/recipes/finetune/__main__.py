"""`python -m bertfast.recipes.finetune --task classify --data train.csv --model DIR --out RUN`.

--predict FILE and --explain TEXT use the model that was trained, now or earlier.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from ...commands.errors import UserError, need
from .. import command_line
from ..pretrain import configuration
from .options import FinetuneOptions

NEEDED = ("transformers", "accelerate", "sklearn", "seqeval", "pyarrow", "matplotlib")
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _finetune(options: FinetuneOptions) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("fine-tuning is one process on one device: start it without torchrun")
    if options.peft is not None:
        need("--peft", ("peft",), "finetune")
    if options.explain is not None:
        need("--explain", ("captum",), "finetune")
    from . import predict, train

    if options.data is not None:
        if options.out.suffix in (*predict.ENDINGS, ".html"):
            raise UserError(f"--out must be a folder for what --data trains, got {options.out}")
        status = train.train(options)
        if status or not (options.predict or options.explain):
            return status
        options = train.for_predicting(options, options.out / "model")
    if options.predict is not None:
        predict.predict(options, _file(options.out, predict.ENDINGS, "predictions.jsonl"))
    if options.explain is not None:
        predict.explain(options, _file(options.out, (".html",), "explained.html"))
    return 0


def _file(out: Path, endings: Sequence[str], name: str) -> Path:
    """--out itself, or a file in that folder."""
    if out.suffix in endings:
        return out
    if out.suffix and not out.is_dir():
        raise UserError(f"--out must be a folder, or end in one of {', '.join(endings)}, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    return out / name


app.command(
    no_args_is_help=True,
    epilog="Exit status: 0 if all is well, 2 for a request that can't be met, 143 or 130 where "
    "SIGTERM or Ctrl-C ended training: its checkpoint is written, and the same command goes on.",
)(configuration.as_command("finetune", FinetuneOptions, _finetune))


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    need("fine-tuning", NEEDED, "finetune")
    return app(list(arguments), standalone_mode=False) or 0


def main(arguments: Sequence[str] | None = None) -> None:
    command_line.main(run, arguments)


if __name__ == "__main__":
    main()
