"""`python -m bertfast.recipes.embed INPUT OUTPUT --model DIR`: vectors of a corpus, or scores of
pairs, in shards.

Stopped at any moment, it goes on by the same command. --ray runs it on Ray, here or on a cluster.
"""

import re
from collections.abc import Sequence

import typer

from ...commands.errors import need
from .. import command_line
from ..pretrain import configuration
from .options import EmbedOptions

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _embed(options: EmbedOptions) -> int:
    from .command import embed

    return embed(options)


app.command(
    no_args_is_help=True,
    epilog="Exit status: 0 if all is well, 2 for a request that can't be met, 130 after Ctrl-C; "
    "the same command goes on after the last whole shard.",
)(configuration.as_command("embed", EmbedOptions, _embed))


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    need("embedding files", ("transformers", "pyarrow"), "embed")
    return app(_with_address(arguments), standalone_mode=False) or 0


def _with_address(arguments: Sequence[str]) -> list[str]:
    """`--ray` alone is Ray on this machine."""
    made: list[str] = []
    for place, word in enumerate(arguments):
        made.append(word)
        if word == "--ray":
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            if not re.fullmatch(r"auto|local|(ray://)?[^/\s]+:\d+", following):
                made.append("local")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    command_line.main(run, arguments)


if __name__ == "__main__":
    main()
