"""The `bertfast` command: its options, and what becomes of an error."""

import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..ops import dispatch
from .bench.command import DTYPES, WHAT
from .bench.command import bench as run_bench
from .bench.encoder import PASSES
from .bench.lengths import MIXES
from .bench.models import MODELS
from .errors import UserError, one_of, some_of
from .kernels.rows import aot_names

# Without rich's boxes: help that is piped is as plain as on a terminal.
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fused kernels for BERT-family encoders: what works here, is it right, how fast is it?",
    epilog="Exit status: 0 if all is well, 1 for a number or a kernel outside its budget, 2 for a "
    "request that can't be met, 130 after Ctrl-C.",
)
# What typer raises for an option that it can't read.
_UsageError: Any
(_UsageError,) = (c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _choice(option: str, known: Iterable[str], help: str, several: bool = False) -> Any:
    """An option whose values are known: listed in the help, completed by a shell, checked. Where
    several can be given, separated by commas, the command gets a list."""
    names = list(known)
    check = some_of if several else one_of
    metavar = f"[{'|'.join(names)}]{',...' if several else ''}"
    if len(option) + len(metavar) > 76:  # a line of a terminal, where it can't be broken
        metavar, help = "NAME", f"{help} One of: {', '.join(names)}."
    return typer.Option(
        option,
        metavar=metavar,
        parser=lambda given: given if isinstance(given, list) else check(option, given, names),
        autocompletion=lambda incomplete: [n for n in names if n.startswith(incomplete)],
        help=help,
    )


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bertfast {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def env(as_json: Json = False) -> int:
    """Everything installed; which backends work here, or why not."""
    from .env import env

    return env(as_json)


@app.command()
def demo(
    texts: Annotated[int, typer.Option(min=2, max=1000, help="How many to embed.")] = 200,
    plot: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("bertfast-demo.png"),
) -> int:
    """A pretrained model before and after: its numbers and its time."""
    from .demo import demo

    return demo(texts, plot)


@app.command()
def verify(
    op: Annotated[Any, _choice("--op", dispatch.ops(), "Only this op; not with --model.")] = None,
    backend: Annotated[Any, _choice("--backend", dispatch.BACKENDS, "Only this backend.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A saved Hugging Face model: compare it, converted and not, instead.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="With --model: a file of texts to compare it on, one a line."),
    ] = None,
    as_json: Json = False,
) -> int:
    """The numbers of every op and backend here against float64.

    With --model: a saved model's, converted and not."""
    if model is not None:
        if op is not None:
            raise UserError("--op can't be chosen with --model: a model is compared as a whole")
        from .verify_model import verify_model

        return verify_model(model, texts, backend, as_json)
    if texts is not None:
        raise UserError("--texts is for --model: it has no meaning for the ops")
    from .verify import verify

    return verify(op, backend, as_json)


@app.command()
def kernels(
    archs: Annotated[
        str | None,
        typer.Option(
            metavar="sm_NN,...",
            help="Architectures, such as sm_80,sm_90a; default: one of each generation.",
        ),
    ] = None,
    op: Annotated[Any, _choice("--op", aot_names(), "Only this op.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every kernel in every form, not the summary alone.")
    ] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="The same counts of other libraries' kernels.")
    ] = False,
    model: Annotated[
        bool, typer.Option("--model", help="Attention's speed, by a model of the counts.")
    ] = False,
    as_json: Json = False,
    update_budget: Annotated[
        bool, typer.Option(help="Write what was measured as the new budget, and show the change.")
    ] = False,
) -> int:
    """The machine code of the kernels, measured beside its budget."""
    from .kernels import kernels

    return kernels(
        archs,
        op,
        every=every,
        with_peers=peers,
        with_model=model,
        as_json=as_json,
        update_budget=update_budget,
    )


@app.command()
def tune(
    model: Annotated[
        str | None,
        typer.Option(
            metavar=f"[{'|'.join(MODELS)}|DIR]",
            help="Widths and heads of one of these, or of a saved model; default: all three, and "
            "gated MLPs of ModernBERT's and NomicBERT's sizes.",
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(metavar="ROWSxLENGTH,...", help="Batches that matter: 64x128,8x512."),
    ] = None,
    dtype: Annotated[Any, _choice("--dtype", DTYPES, "Default: bf16,fp16.", several=True)] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long it may take.")] = 3.0,
) -> int:
    """The fastest kernels on this GPU, for "auto" to follow.

    Written to a file in the user's cache directory, or where BERTFAST_TUNED says."""
    from .tune import tune

    return tune(model, shapes, dtype, minutes)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            metavar=f"[{'|'.join(WHAT)}]",
            autocompletion=lambda incomplete: [
                name for name in WHAT if name.startswith(incomplete)
            ],
        ),
    ] = "model",
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar=f"[{'|'.join(MODELS)}|DIR]",
            help="One of these with random weights, or a saved model's directory.",
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(metavar="ROWSxLENGTH,...", help="Batches without padding: 1x128,32x512."),
    ] = None,
    mix: Annotated[
        Any, _choice("--mix", MIXES, "Batches of lengths as they are.", several=True)
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Sequences in a batch of --mix.")] = None,
    passes: Annotated[
        Any, _choice("--pass", PASSES, "latency: of one sequence.", several=True)
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Of single calls of a model: median and p99 of 1000.")
    ] = False,
    dtype: Annotated[
        Any, _choice("--dtype", DTYPES, "Default: bf16 on a GPU, else fp32.", several=True)
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Only this one, such as 'HF SDPA'; may be repeated.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every row to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write plots into this directory.")
    ] = None,
) -> int:
    """How fast, beside every alternative and the machine's limit.

    The numbers are checked before they are timed."""
    return run_bench(
        one_of("what to measure", what, WHAT),
        model=model,
        shapes=shapes,
        mix=mix,
        rows=rows,
        passes=passes,
        latency=latency,
        dtype=dtype,
        provider=provider or (),
        csv=csv,
        plot=plot,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: the one place where a user's error becomes a line and a status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where it can't show the sign of plus and minus
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except UserError as error:
        text = str(error)
    except _UsageError as error:
        text = error.format_message()
    print(f"bertfast: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)
