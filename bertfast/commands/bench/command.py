"""`bertfast bench`: what is measured by default, what can't go together, the tables, the files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from ..errors import UserError, one_of, writable_directory, writable_file
from ..saved import need_transformers
from ..terminal import BAD, Progress, console, paragraph
from . import cases, models
from .baselines import MODEL_PROVIDERS
from .ceilings import Machine
from .compare import verdicts
from .encoder import PASSES, EncoderBench, EncoderCase
from .encoder import cases as encoder_cases
from .layer_baselines import LAYER_PROVIDERS
from .measure import Bench
from .models import MODELS, Model, Tokens
from .parts import measure_parts
from .record import Recorder, environment
from .tables import by_op, legend, op_table

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROVIDERS = {"layer": LAYER_PROVIDERS, "model": MODEL_PROVIDERS}
WHAT = ("ops", "layer", "model")
FULL_SHAPES = "1x128,8x128,32x128,32x512,64x384"


def bench(
    what: str,
    *,
    model: str | None = None,
    shapes: str | None = None,
    mix: Sequence[str] | None = None,
    rows: int | None = None,
    passes: Sequence[str] | None = None,
    dtype: Sequence[str] | None = None,
    provider: Sequence[str] = (),
    csv: Path | None = None,
    plot: Path | None = None,
) -> int:
    """Measures and prints; returns the exit code: 1 if a number was wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = _plan(what, device, model, shapes, mix, rows, passes, dtype)
    for name in provider:
        one_of("--provider", name, _provider_names(what, plan, device))
    if csv is not None:
        writable_file("--csv", csv)
    if plot is not None:
        from . import plots

        plots.need_matplotlib()
        writable_directory("--plot", plot)
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        return _run(plan, device, provider, csv, plot)
    finally:
        torch.set_num_threads(threads)


def _provider_names(what: str, plan: list, device: str) -> list[str]:
    if what != "ops":
        return [one.name for one in PROVIDERS[what]]
    return list(dict.fromkeys(name for case in plan for name in case.providers(device)))


def _plan(what, device, model, shapes, mix, rows, passes, dtype) -> list:
    """The cases."""
    gpu = device == "cuda"
    dtypes = dtype or ["bf16" if gpu else "fp32"]
    if what == "ops":
        given = {"model": model, "shapes": shapes, "mix": mix, "rows": rows, "pass": passes}
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--{name} is for a layer or a model: ops have shapes of their own")
        found = cases.all_cases() if gpu else cases.cpu_cases()
        if dtype is not None:
            found = [case for case in found if case.dtype in [DTYPES[name] for name in dtypes]]
        if not found:
            raise UserError(f"--dtype: no case of the ops has {', '.join(dtypes)} on this device")
        return found
    if rows is not None and not mix:
        raise UserError("--rows is for --mix: --shapes says how many sequences a batch has")
    need_transformers(f"bench {what}")
    chosen = passes or (PASSES if gpu else ("forward",))
    batches = _batches(what, gpu, shapes, mix, rows)
    measured = _models(model, gpu, layer=what == "layer")
    for one in measured if what == "model" else ():
        for tokens in batches:
            if tokens.longest > one.positions:
                raise UserError(
                    f"{tokens.name} is longer than the {one.positions} positions of {one.name}"
                )
    layer = what == "layer"
    found = list(encoder_cases(measured, batches, chosen, [DTYPES[n] for n in dtypes], layer))
    if "latency" in (passes or ()) and all(len(tokens.lengths) > 1 for tokens in batches):
        raise UserError("--pass: latency is that of one sequence, such as --shapes 1x128")
    return found


def _batches(what: str, gpu: bool, shapes, mix, rows) -> list[Tokens]:
    if what == "layer" and mix:
        raise UserError("--mix is for a model: packing happens there, once for all layers")
    found = models.parse_shapes(shapes) if shapes is not None else []
    found += models.mixed_batches(mix or (), rows or (64 if gpu else 16))
    if found:
        return found
    if what == "layer":
        return models.parse_shapes(FULL_SHAPES if gpu else "1x128,8x128")
    if not gpu:
        return models.parse_shapes("1x128") + models.mixed_batches(("queries", "squad"), 16)
    return models.parse_shapes(FULL_SHAPES) + models.mixed_batches(
        ("squad", "queries", "wikipedia", "passages"), 64
    )


def _models(given: str | None, gpu: bool, layer: bool) -> list[Model]:
    if given is None:
        return list(MODELS.values()) if gpu else [MODELS["MiniLM-L6"]]
    if Path(given).is_dir():
        return [models.saved(given, layer)]
    return [MODELS[one_of("--model, where it is no directory,", given, MODELS)]]


def _run(
    plan: list, device: str, wanted: Sequence[str], csv: Path | None, plot: Path | None
) -> int:
    out = console()
    facts = environment(device)
    recorder = Recorder(csv, facts)
    out.print(
        paragraph(
            f"{facts.device}, torch {facts.torch}, transformers {facts.transformers}, "
            f"bertfast {facts.bertfast_commit}, load {facts.load}"
        )
    )
    if device == "cpu":
        out.print("One thread, processor time. Kernels and CUDA graphs need a GPU.")
    with Progress(len(plan)) as progress:
        progress.show("ceilings")
        machine = Machine(device, recorder.add)
        ops = Bench(machine, recorder, repeats=15 if device == "cuda" else 7, say=lambda text: None)
        encoders = EncoderBench(
            machine,
            recorder,
            providers=wanted or None,
            slow=device == "cuda" or bool(wanted),
            say=lambda text: None,
            progress=progress.show,
        )
        for case in plan:
            if isinstance(case, EncoderCase):
                encoders.measure(case)
                if case.layer and case.pass_ == "forward" and not wanted:
                    measure_parts(machine, recorder, case.model, case.tokens, case.dtype)
            else:
                progress.show(f"{case.op} {case.pass_} {case.shape}")
                if providers := _op_providers(case, device, wanted):
                    ops.measure(case, providers)
            progress.step()
    if not by_op(recorder.rows):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in encoders.left_out.items())
        raise UserError(f"nothing was measured: {reasons}")
    _print(out, recorder)
    absent = encoders.left_out | {line.split(":")[0]: line for line in ops.left_out}
    for name, reason in absent.items():
        out.print(paragraph(f"left out: {name}: {reason}", indent=2))
    faults = ops.faults + encoders.faults
    for fault in faults:
        out.print(paragraph(f"FAULT {fault}", indent=2), style=BAD)
    if csv is not None:
        out.print(f"{len(recorder.rows)} rows in {csv}")
    if plot is not None:
        from . import plots

        for path in plots.draw(recorder.rows, facts, plot):
            out.print(f"plot: {path}")
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


def _print(out: Console, recorder: Recorder) -> None:
    for row in recorder.rows:
        if row.op == "copy":
            out.print(f"copy: {row.gb_per_s:.3g} GB/s, read plus written")
        if row.op == "matmul":
            out.print(f"product {row.shape} {row.dtype}: {row.tflop_per_s:.3g} TFLOP/s")
    out.print()
    for op, found in by_op(recorder.rows).items():
        op_table(op, found).print(out)
        out.print("\n".join((*verdicts(found), "")))
    out.print(legend())
