"""`bertfast bench`: what is measured by default, the progress bar, the tables, the files."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import cases, models
from .baselines import MODEL_PROVIDERS
from .ceilings import Machine
from .encoder import PASSES, EncoderBench, EncoderCase
from .encoder import cases as encoder_cases
from .layer_baselines import LAYER_PROVIDERS
from .measure import Bench
from .models import MODELS, Model, Tokens
from .parts import measure_parts
from .record import Recorder, Row, environment
from .tables import case_table, grouped

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROVIDERS = {"layer": LAYER_PROVIDERS, "model": MODEL_PROVIDERS}
WHAT = ("ops", "layer", "model")
FULL_SHAPES = "1x128,8x128,32x128,32x512,64x384"


def bench(
    what: str,
    *,
    model: str | None = None,
    shapes: str | None = None,
    mix: str | None = None,
    rows: int | None = None,
    passes: str | None = None,
    dtype: str | None = None,
    provider: Sequence[str] = (),
    csv: Path | None = None,
    plot: Path | None = None,
) -> int:
    """Measures and prints; returns the exit code: 1 if a number was wrong, 2 for a bad argument."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        plan = _plan(what, device, model, shapes, mix, rows, passes, dtype)
        if what != "ops":
            known = [one.name for one in PROVIDERS[what]]
            for name in provider:
                if name not in known:
                    raise ValueError(f"--provider must be of {', '.join(known)}, got {name!r}")
        if plot is not None:
            from . import plots

            plots.need_matplotlib()
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        return _run(plan, device, provider, csv, plot)
    finally:
        torch.set_num_threads(threads)


def _plan(what, device, model, shapes, mix, rows, passes, dtype) -> list:
    """The cases."""
    if what not in WHAT:
        raise ValueError(f"what to measure must be one of {', '.join(WHAT)}, got {what!r}")
    gpu = device == "cuda"
    dtypes = _chosen("dtype", dtype or ("bf16" if gpu else "fp32"), tuple(DTYPES))
    if what == "ops":
        for name, value in (("model", model), ("shapes", shapes), ("mix", mix), ("pass", passes)):
            if value is not None:
                raise ValueError(
                    f"--{name} is for a layer or a model: ops have shapes of their own"
                )
        found = cases.all_cases() if gpu else cases.cpu_cases()
        if dtype is not None:
            found = [case for case in found if case.dtype in [DTYPES[name] for name in dtypes]]
        if not found:
            raise ValueError(f"no case of the ops has dtype {dtype} on this device")
        return found
    _need_transformers()
    chosen_passes = _chosen(
        "pass", passes or ("forward,forward+backward" if gpu else "forward"), PASSES
    )
    if gpu and passes is None:
        chosen_passes = list(PASSES)
    batches = _batches(what, gpu, shapes, mix, rows)
    found = list(
        encoder_cases(
            _models(model, gpu),
            batches,
            chosen_passes,
            [DTYPES[name] for name in dtypes],
            layer=what == "layer",
        )
    )
    if not found:
        raise ValueError("nothing to measure: latency is that of one sequence, such as 1x128")
    return found


def _batches(what: str, gpu: bool, shapes, mix, rows) -> list[Tokens]:
    names = mix.replace(" ", "").split(",") if mix else []
    if what == "layer" and names:
        raise ValueError("--mix is for a model: packing happens there, once for all layers")
    found = models.parse_shapes(shapes) if shapes else []
    if rows is not None and rows < 1:
        raise ValueError(f"--rows must be at least 1, got {rows}")
    found += models.parse_mixes(names, rows or (64 if gpu else 16))
    if found:
        return found
    if what == "layer":
        return models.parse_shapes(FULL_SHAPES if gpu else "1x128,8x128")
    if not gpu:
        return models.parse_shapes("1x128") + models.parse_mixes(("queries", "squad"), 16)
    return models.parse_shapes(FULL_SHAPES) + models.parse_mixes(
        ("squad", "queries", "wikipedia", "passages"), 64
    )


def _models(directory: str | None, gpu: bool) -> list[Model]:
    if directory in MODELS:
        return [MODELS[directory]]
    if directory is not None:
        if not os.path.isdir(directory):
            known = ", ".join(MODELS)
            raise ValueError(f"--model must be a directory or one of {known}, got {directory!r}")
        return [models.saved(directory)]
    return list(MODELS.values()) if gpu else [MODELS["MiniLM-L6"]]


def _chosen(name: str, text: str, known: Sequence[str]) -> list[str]:
    names = text.replace(" ", "").split(",")
    for one in names:
        if one not in known:
            raise ValueError(f"--{name} must be of {', '.join(known)}, got {one!r}")
    return names


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"layers and models are compared with Hugging Face's, and transformers is missing: "
            f"pip install 'bertfast[bench]' ({error})"
        ) from None


def _run(
    plan: list, device: str, wanted: Sequence[str], csv: Path | None, plot: Path | None
) -> int:
    console = Console(highlight=False, soft_wrap=True)
    facts = environment(device)
    recorder = Recorder(csv, facts)
    console.print(
        f"{facts.device}, torch {facts.torch}, transformers {facts.transformers}, "
        f"bertfast {facts.bertfast_commit}, load {facts.load}"
    )
    if device == "cpu":
        console.print("One thread, processor time. Kernels and CUDA graphs need a GPU.")
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # It is drawn when something is said: a thread that draws would be in the processor time.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("ceilings", total=len(plan))

        def show(text: str) -> None:
            progress.update(task, description=escape(text), refresh=True)

        progress.refresh()
        machine = Machine(device, recorder.add)
        ops = Bench(machine, recorder, repeats=15 if device == "cuda" else 7, say=lambda text: None)
        encoders = EncoderBench(
            machine,
            recorder,
            providers=wanted or None,
            slow=device == "cuda" or bool(wanted),
            say=lambda text: None,
            progress=show,
        )
        for case in plan:
            if isinstance(case, EncoderCase):
                encoders.measure(case)
                if case.layer and case.pass_ == "forward" and not wanted:
                    measure_parts(machine, recorder, case.model, case.tokens, case.dtype)
            else:
                show(f"{case.op} {case.pass_} {case.shape}")
                ops.measure(case, _op_providers(case, device, wanted))
            progress.advance(task)
    _print(console, recorder, machine)
    absent = encoders.left_out | {line.split(":")[0]: line for line in ops.left_out}
    for name, reason in absent.items():
        console.print(f"left out: {escape(name)}: {escape(reason)}")
    faults = ops.faults + encoders.faults
    for fault in faults:
        console.print("[red]FAULT[/]", escape(fault))
    if csv is not None:
        console.print(f"{len(recorder.rows)} rows in {csv}")
    if plot is not None:
        from . import plots

        plot.mkdir(parents=True, exist_ok=True)
        for path in plots.draw(recorder.rows, facts.device, plot):
            console.print(f"plot: {path}")
    return 1 if faults else 0


def _op_providers(case, device: str, wanted: Sequence[str]) -> dict:
    """On a CPU without what only shows that it computes the right thing, and without compiling."""
    found = case.providers(device)
    if wanted:
        return {name: call for name, call in found.items() if name in wanted}
    if device == "cuda":
        return found
    slow = ("bertfast triton", "bertfast cuda", "torch compile", "torch sdpa math")
    return {name: call for name, call in found.items() if name not in slow}


def _print(console: Console, recorder: Recorder, machine: Machine) -> None:
    for row in recorder.rows:
        if row.op == "copy":
            console.print(f"copy: {row.gb_per_s:.3g} GB/s, read plus written")
        if row.op == "matmul":
            console.print(f"product {row.shape} {row.dtype}: {row.tflop_per_s:.3g} TFLOP/s")
    for key, rows in grouped(recorder.rows).items():
        if not _is_ceiling(rows[0]):
            console.print(case_table(key, rows))
    console.print(
        "speed-up: over HF SDPA, or stock torch\n"
        "spread: from the 20th to the 80th percentile, in percent of the median\n"
        "floor: the least possible time, from the ceilings above, by the time taken; work on\n"
        "       padding counts as waste\n"
        "error: the relative error against float64, measured before the time\n"
        "tokens/s counts real tokens, padded/s the padding to the batch's longest as well"
    )


def _is_ceiling(row: Row) -> bool:
    return row.op in ("copy", "matmul", "launch gap")
