"""`python -m bertfast.recipes.pretrain`: prepare, train and evaluate, or all three by a file.

python -m bertfast.recipes.pretrain train --data DATA --out RUN --steps 1000
python -m bertfast.recipes.pretrain CONFIG.yaml
torchrun --nproc-per-node 8 -m bertfast.recipes.pretrain CONFIG.yaml
"""

from collections.abc import Callable, Sequence
from typing import Any

import typer

from ...commands.errors import UserError, need
from .. import command_line
from . import configuration
from .options import EvaluateOptions, PrepareOptions, TrainOptions
from .parallel import FirstFailed, connected, started

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="BERT's pre-training: from text to a transformers model. A file CONFIG.yaml in the place "
    "of a command runs those that it has sections for, with the options there.",
    epilog="Exit status: 0 if all is well, 2 for a request that can't be met, 143 or 130 where "
    "SIGTERM or Ctrl-C ended training: its checkpoint is written, and the same command goes on.",
)


def _prepare(options: PrepareOptions) -> int:
    from .prepared import prepare

    with started("cpu", patient=True) as processes:
        return prepare(options, processes)


def _train(options: TrainOptions) -> int:
    from .train import train

    with started(options.device) as processes:
        return train(options, processes)


def _evaluate(options: EvaluateOptions) -> int:
    from .evaluate import evaluate_folder

    with started(options.device) as processes:
        return evaluate_folder(options, processes)


# Name -> its options and its work, in the order in which a file runs them.
COMMANDS: dict[str, tuple[Any, Callable[[Any], int]]] = {
    "prepare": (PrepareOptions, _prepare),
    "train": (TrainOptions, _train),
    "evaluate": (EvaluateOptions, _evaluate),
}
for _name, (_options, _run) in COMMANDS.items():
    app.command(_name)(configuration.as_command(_name, _options, _run))


def run(arguments: Sequence[str]) -> int:
    """Runs a command, or the commands of a file; returns the exit status."""
    need("pre-training", ("transformers", "pyarrow", "tensorboard"), "train")
    if not arguments:
        arguments = ["--help"]
    if arguments[0].endswith((".yaml", ".yml")):
        if arguments[1:]:
            raise UserError(
                f"{arguments[0]} has all options, so none may follow it, got {arguments[1]!r}"
            )
        kinds = {name: options for name, (options, _) in COMMANDS.items()}
        with connected():
            for name, options in configuration.read(arguments[0], kinds):
                status = COMMANDS[name][1](options)
                if status:
                    return status
        return 0
    return app(list(arguments), standalone_mode=False) or 0


def main(arguments: Sequence[str] | None = None) -> None:
    command_line.main(run, arguments, (FirstFailed,))


if __name__ == "__main__":
    main()
