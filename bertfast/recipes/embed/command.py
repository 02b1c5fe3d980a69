"""The command's work: shards that are missing, computed here or by Ray's actors."""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...commands.errors import UserError
from . import encoders, output, skipped
from .embedder import Counts, CrossScorer, Embedder
from .options import EmbedOptions
from .output import Keys, Run
from .rows import Columns


def embed(options: EmbedOptions) -> int:
    _check(options)
    if options.ray is None:
        device = encoders.device_of(options.device)
        return _embed(options, device, _here)
    from . import scale

    paths = {name: getattr(options, name).resolve() for name in ("input", "output", "model")}
    options = dataclasses.replace(options, **paths)  # actors have folders of their own
    with scale.connected(options) as cluster:
        return _embed(options, cluster.device, functools.partial(scale.on_ray, cluster))


# Options that say how tokens become a vector.
VECTORS = ("pooling", "normalize", "prompt", "prompt_name")


def _check(options: EmbedOptions) -> None:
    if options.id in output.OWN:
        raise UserError(f"--id can't be {options.id!r}, which is a column of the output's own")
    if options.pair is None:
        return
    if options.pair == options.column:
        raise UserError(f"--pair must be another column than --column, got {options.pair!r} twice")
    for name in VECTORS:
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is for vectors, and --pair asks for scores")


def _computes(options: EmbedOptions, device: torch.device) -> tuple[Embedder | CrossScorer, dict]:
    """The class that computes the rows, and the options that decide their numbers. A folder that
    can't be read is an error, before any text is."""
    dtype = encoders.dtype_of(options.precision, device)
    precision = {known: name for name, known in encoders.DTYPES.items()}[dtype]
    asked: dict[str, Any] = {"length": options.length, "precision": precision}
    common: dict[str, Any] = {
        "tokens": options.tokens,
        "window": options.shard,
        "device": "auto" if options.ray is not None and device.type == "cuda" else options.device,
    }
    if options.pair is not None:
        encoders.check_scorer(options.model)
        return CrossScorer(options.model, **asked, **common), asked
    asked |= {name: getattr(options, name) for name in VECTORS}
    embedder = Embedder(options.model, **asked, **common)
    encoders.plan(options.model, embedder._asked)
    return embedder, asked


def _embed(options: EmbedOptions, device: torch.device, work: Callable[..., Any]) -> int:
    embedder, asked = _computes(options, device)
    made_of = {
        "model": str(options.model.resolve()),
        "model_checksum": output.of_model(options.model),
        **asked,
    }
    what = "texts" if options.pair is None else "pairs"
    with output.locked(options.output), _told():
        with _bar("reading", what, 0, 0) as bar:
            run = output.begin(
                options.output,
                options.input,
                Columns(options.column, options.id, options.pair),
                form=options.format,
                size=options.shard,
                made_of=made_of,
                skip_bad=options.skip_bad,
                overwrite=options.overwrite,
                bar=bar,
            )
        if run.skipped:
            lines = skipped.lines(run.folder, len(run.skipped))
            print("\n".join(lines), file=sys.stderr)
        missing = run.missing()
        if not missing:
            print(f"{options.output} has all {run.rows:,} rows already")
            if not (run.folder / output.INDEX).exists():
                run.finish()
            return 0
        counts, seconds = work(run, embedder, missing)
        run.finish()
    said = [f"{counts.texts:,} {what}", f"{counts.texts / seconds:,.1f} {what}/s"]
    if counts.tokens:
        said.append(f"{counts.tokens / seconds:,.0f} tokens/s")
        said.append(f"{100 * counts.tokens / counts.computed:.1f} % useful")
    print(f"{options.output}: {run.rows:,} rows in {run.shards} shards | {' | '.join(said)}")
    return 0


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors of files as the command's own."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(str(error)) from None


def _here(run: Run, embedder: Embedder | CrossScorer, missing: list[int]) -> tuple[Counts, float]:
    embedder.encoder  # noqa: B018  its loading is no part of the speed
    keys: dict[int, Keys] = {}

    def items() -> Iterator[list[Any]]:
        for shard in missing:
            read, keys[shard] = run.read(shard)
            yield read

    with Meter(run, missing) as meter:
        made = embedder.windows(items(), meter.add)
        with contextlib.closing(made):  # type: ignore[type-var]
            for shard, rows in zip(missing, made, strict=True):
                run.write(shard, rows, keys.pop(shard))
    return embedder.counts, meter.seconds


class Meter:
    """The progress bar: rows, time left, tokens/s and their useful share of what is computed."""

    def __init__(self, run: Run, missing: list[int]) -> None:
        done = run.rows - sum(map(run.count, missing))
        what = "texts" if run.columns.pair is None else "pairs"
        self._bar = _bar(what, what, run.rows, done)
        self._counts = Counts()
        self._begun = time.perf_counter()
        self.seconds = 0.0

    def add(self, counts: Counts) -> None:
        self._counts += counts
        self.seconds = time.perf_counter() - self._begun
        if self._counts.computed:
            rate = self._counts.tokens / self.seconds
            useful = 100 * self._counts.tokens / self._counts.computed
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s, {useful:.0f} % useful", refresh=False)
        self._bar.update(counts.texts)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._begun
        self._bar.close()


def _bar(label: str, what: str, total: int, done: int) -> Any:
    from tqdm import tqdm

    seldom = {} if sys.stderr.isatty() else {"mininterval": 30}
    unit = {"desc": label, "unit": f" {what}"}
    return tqdm(total=total or None, initial=done, leave=False, **unit, **seldom)
