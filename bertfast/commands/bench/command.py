"""`bertfast bench`: what is measured by default, what can't go together, the tables, the files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.text import Text

from ..errors import UserError, one_of, writable_directory, writable_file
from ..saved import need_transformers
from ..terminal import BAD, Progress, console, paragraph
from . import cases, models
from .case import Case
from .ceilings import Machine
from .encoder import PASSES, EncoderCase
from .encoder import cases as encoder_cases
from .harness import Bench
from .models import MODELS, Model, Tokens
from .parts import measure_parts
from .record import DTYPES, Recorder, environment
from .tables import by_op, ceilings, everything

WHAT = ("ops", "layer", "model")
FULL_SHAPES = "1x128,8x128,32x128,32x512,64x384"
LATENCY_SHAPES = "1x16,1x128,8x128"
MIXED = ("squad", "queries", "wikipedia", "passages")


def bench(
    what: str,
    *,
    model: str | None = None,
    shapes: str | None = None,
    mix: Sequence[str] | None = None,
    rows: int | None = None,
    passes: Sequence[str] | None = None,
    latency: bool = False,
    dtype: Sequence[str] | None = None,
    provider: Sequence[str] = (),
    csv: Path | None = None,
    plot: Path | None = None,
) -> int:
    """Measures and prints; returns the exit code: 1 if a number was wrong."""
    gpu = torch.cuda.is_available()
    if latency:
        if what != "model" or passes or mix:
            raise UserError("--latency is of a model, and takes neither --pass nor --mix")
        passes, shapes = ("latency",), shapes or LATENCY_SHAPES
    plan: list[Case]
    if what == "ops":
        given = {"model": model, "shapes": shapes, "mix": mix, "rows": rows, "pass": passes}
        plan = list(_ops(gpu, dtype, given))
    else:
        dtypes = [DTYPES[name] for name in dtype or (("bf16",) if gpu else ("fp32",))]
        plan = list(
            _encoders(what, gpu, model, _batches(what, gpu, shapes, mix, rows), passes, dtypes)
        )
    known = dict.fromkeys(one.name for case in plan for one in case.providers())
    for name in provider:
        one_of("--provider", name, known)
    if csv is not None:
        writable_file("--csv", csv)
    if plot is not None:
        from . import plots

        plots.need_matplotlib()
        writable_directory("--plot", plot)
    threads = torch.get_num_threads()
    if not gpu:
        torch.set_num_threads(1)
    try:
        return _run(plan, gpu, provider, csv, plot)
    finally:
        torch.set_num_threads(threads)


def _ops(gpu: bool, dtype: Sequence[str] | None, given: Mapping[str, object]) -> Sequence[Case]:
    for name, value in given.items():
        if value is not None:
            raise UserError(f"--{name} is for a layer or a model: ops have shapes of their own")
    found = cases.gpu_cases() if gpu else cases.cpu_cases()
    if dtype is not None:
        found = [case for case in found if case.dtype in [DTYPES[name] for name in dtype]]
        if not found:
            raise UserError(f"--dtype: no case of the ops has {', '.join(dtype)} on this device")
    return found


def _encoders(
    what: str,
    gpu: bool,
    model: str | None,
    batches: list[Tokens],
    passes: Sequence[str] | None,
    dtypes: list[torch.dtype],
) -> list[EncoderCase]:
    need_transformers(f"bench {what}")
    layer = what == "layer"
    measured = _models(model, gpu, layer)
    for one in () if layer else measured:
        for tokens in batches:
            if tokens.longest > one.positions:
                raise UserError(
                    f"{tokens.name} is longer than the {one.positions} positions of {one.name}"
                )
    alone = tuple(passes or ()) == ("latency",)
    if "latency" in (passes or ()) and not alone and all(len(b.lengths) > 1 for b in batches):
        raise UserError(
            "--pass: beside other passes latency is that of one sequence, such as --shapes 1x128"
        )
    chosen = passes or (PASSES if gpu else ("forward",))
    return list(encoder_cases(measured, batches, chosen, dtypes, layer, several=alone))


def _batches(
    what: str, gpu: bool, shapes: str | None, mix: Sequence[str] | None, rows: int | None
) -> list[Tokens]:
    if rows is not None and not mix:
        raise UserError("--rows is for --mix: --shapes says how many sequences a batch has")
    if what == "layer" and mix:
        raise UserError("--mix is for a model: packing happens there, once for all layers")
    rows = rows or (64 if gpu else 16)
    if shapes is None and not mix:
        shapes = FULL_SHAPES if gpu else "1x128,8x128" if what == "layer" else "1x128"
        if what == "model":
            mix = MIXED if gpu else ("queries", "squad")
    found = models.parse_shapes(shapes) if shapes is not None else []
    return found + [models.mixed_batch(name, rows) for name in mix or ()]


def _models(given: str | None, gpu: bool, layer: bool) -> list[Model]:
    if given is None:
        return list(MODELS.values()) if gpu else [MODELS["MiniLM-L6"]]
    if Path(given).is_dir():
        return [models.saved(given, layer)]
    return [MODELS[one_of("--model, where it is no directory,", given, MODELS)]]


def _run(
    plan: list[Case], gpu: bool, wanted: Sequence[str], csv: Path | None, plot: Path | None
) -> int:
    out = console()
    facts = environment("cuda" if gpu else "cpu")
    recorder = Recorder(csv, facts)
    out.print(
        paragraph(
            f"{facts.device}, torch {facts.torch}, transformers {facts.transformers}, "
            f"bertfast {facts.bertfast_commit}, load {facts.load}"
        )
    )
    if not gpu:
        out.print("One thread, processor time. Kernels and CUDA graphs need a GPU.")
    with Progress(len(plan)) as progress:
        progress.show("ceilings")
        bench = Bench(
            Machine("cuda" if gpu else "cpu", recorder.add),
            recorder,
            repeats=15 if gpu and plan[0].kind == "op" else 7,
            wanted=wanted or None,
            slow=gpu or bool(wanted),
            progress=progress.show,
        )
        for case in plan:
            bench.measure(case)
            if (
                isinstance(case, EncoderCase)
                and case.layer
                and case.pass_ == "forward"
                and not wanted
            ):
                measure_parts(bench.machine, recorder, case)
            progress.step()
    if not by_op(recorder.rows):
        raise UserError(f"nothing was measured: {'; '.join(bench.left_out)}")
    out.print("\n".join((*ceilings(recorder.rows), "")))
    for text, style in everything(recorder.rows):
        out.print(Text(text, style=style))
    for line in bench.left_out:
        out.print(paragraph(f"left out: {line}", indent=2))
    for fault in bench.faults:
        out.print(paragraph(f"FAULT {fault}", indent=2), style=BAD)
    if csv is not None:
        out.print(f"{len(recorder.rows)} rows in {csv}")
    if plot is not None:
        from . import plots

        for path in plots.draw(recorder.rows, facts, plot):
            out.print(f"plot: {path}")
    return 1 if bench.faults else 0
