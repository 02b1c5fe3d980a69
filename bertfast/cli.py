"""The `bertfast` command."""

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Fused kernels for BERT-family encoders: what works here, and is it right?",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def env(as_json: Json = False) -> None:
    """What is installed, which backend works on this machine, and why another doesn't."""
    from .env import env

    env(as_json)


@app.command()
def verify(
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    backend: Annotated[str | None, typer.Option(help="Only this backend.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A saved Hugging Face model: compare it, converted and not, instead."),
    ] = None,
    texts: Annotated[
        str | None, typer.Option(help="With --model: a file of texts to compare it on, one a line.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every op on every backend of this machine against float64; exit 1 on a fault."""
    if model is not None:
        from .verify_model import verify_model

        raise typer.Exit(verify_model(model, texts, backend, as_json))
    from .verify import verify

    raise typer.Exit(verify(op, backend, as_json))


@app.command()
def kernels(
    archs: Annotated[str | None, typer.Option(help="Such as sm_80,sm_90a; default: all.")] = None,
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    as_json: Json = False,
    update_budget: Annotated[
        bool, typer.Option(help="Write what was measured as the new budget, and show the change.")
    ] = False,
) -> None:
    """What the compiler made of each kernel: registers, spills, instructions; exit 1 if over."""
    from .kernels import kernels

    chosen = archs.replace(" ", "").split(",") if archs else None
    raise typer.Exit(kernels(chosen, as_json, op, update_budget))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
