"""The `bertfast` command."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Fused kernels for BERT-family encoders: what works here, is it right, how fast is it?",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def env(as_json: Json = False) -> None:
    """What is installed, which backend works on this machine, and why another doesn't."""
    from .env import env

    env(as_json)


@app.command()
def demo(
    texts: Annotated[int, typer.Option(min=2, max=1000, help="How many to embed.")] = 200,
    plot: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("bertfast-demo.png"),
) -> None:
    """A pretrained model before and after bertfast.optimize, on this machine: numbers and time."""
    from .demo import demo

    raise typer.Exit(demo(texts, plot))


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


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="ops, layer or model.")] = "model",
    model: Annotated[
        str | None,
        typer.Option(help="A saved model's directory, or BERT-base, BERT-large, MiniLM-L6."),
    ] = None,
    shapes: Annotated[str | None, typer.Option(help="Without padding: 1x128,32x512.")] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="Lengths as they are: queries, passages, squad, wikipedia, full."),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Sequences in a mix's batch.")] = None,
    passes: Annotated[
        str | None, typer.Option("--pass", help="forward, forward+backward, latency.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16, bf16.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Only this one, such as 'HF SDPA'; may be repeated.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every row to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write plots into this directory.")] = None,
) -> None:
    """How fast, next to every alternative and to the floor; the numbers are checked first."""
    from .bench.command import bench

    raise typer.Exit(
        bench(
            what,
            model=model,
            shapes=shapes,
            mix=mix,
            rows=rows,
            passes=passes,
            dtype=dtype,
            provider=provider or (),
            csv=csv,
            plot=plot,
        )
    )


def main() -> None:
    app()


if __name__ == "__main__":
    main()
