"""The command line of a recipe: errors in one line, warnings in one, and the exit status."""

import io
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from ..commands.errors import UserError

# What typer raises for an option that it can't read.
_UsageError: Any
(_UsageError,) = (c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main(
    run: Callable[[Sequence[str]], int],
    arguments: Sequence[str] | None,
    told_elsewhere: tuple[type[UserError], ...] = (),
) -> NoReturn:
    """Ends the process with the status that `run` gives: 130 after Ctrl-C, 2 for a request that
    can't be met. told_elsewhere: errors that another process tells the user."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    before = warnings.formatwarning
    warnings.formatwarning = lambda text, *_, **__: f"warning: {text}\n"
    try:
        sys.exit(run(sys.argv[1:] if arguments is None else arguments))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except told_elsewhere:
        sys.exit(2)
    except UserError as error:
        text = str(error)
    except _UsageError as error:
        text = error.format_message()
    finally:
        warnings.formatwarning = before
    print(f"bertfast: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)
