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
from . import encoders, output
from .embedder import Counts, Embedder
from .options import EmbedOptions
from .output import Run
from .rows import Columns


def embed(options: EmbedOptions) -> int:
    if options.id in output.OWN:
        raise UserError(f"--id can't be {options.id!r}, which is a column of the output's own")
    if options.ray is None:
        device = encoders.device_of(options.device)
        return _embed(options, device, _here)
    from . import scale

    paths = {name: getattr(options, name).resolve() for name in ("input", "output", "model")}
    options = dataclasses.replace(options, **paths)  # actors have folders of their own
    with scale.connected(options) as cluster:
        return _embed(options, cluster.device, functools.partial(scale.on_ray, cluster))


def _embed(options: EmbedOptions, device: torch.device, work: Callable[..., Any]) -> int:
    dtype = encoders.dtype_of(options.precision, device)
    names = ("pooling", "normalize", "prompt", "prompt_name", "length")
    asked: dict[str, Any] = {name: getattr(options, name) for name in names}
    asked["precision"] = {known: name for name, known in encoders.DTYPES.items()}[dtype]
    embedder = Embedder(
        options.model,
        **asked,
        tokens=options.tokens,
        window=options.shard,
        device="auto" if options.ray is not None and device.type == "cuda" else options.device,
    )
    encoders.plan(options.model, embedder._asked)  # a folder that can't be read, before the texts
    made_of = {
        "model": str(options.model.resolve()),
        "model_checksum": output.of_model(options.model),
        **asked,
    }
    with output.locked(options.output), _told():
        with _bar("reading", 0, 0) as bar:
            run = output.begin(
                options.output,
                options.input,
                Columns(options.column, options.id),
                form=options.format,
                size=options.shard,
                made_of=made_of,
                overwrite=options.overwrite,
                bar=bar,
            )
        missing = run.missing()
        if not missing:
            print(f"{options.output} has all {run.rows:,} rows already")
            if not (run.folder / output.INDEX).exists():
                run.finish()
            return 0
        counts, seconds = work(run, embedder, missing)
        run.finish()
    said = [f"{counts.texts:,} texts", f"{counts.texts / seconds:,.1f} texts/s"]
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


def _here(run: Run, embedder: Embedder, missing: list[int]) -> tuple[Counts, float]:
    embedder.encoder  # noqa: B018  its loading is no part of the speed
    ids: dict[int, list[Any] | None] = {}

    def texts() -> Iterator[list[str]]:
        for shard in missing:
            read = run.read(shard)
            ids[shard] = read.ids
            yield read.texts

    done = run.rows - sum(map(run.count, missing))
    with Meter(run.rows, done) as meter:
        vectors = embedder.windows(texts(), meter.add)
        with contextlib.closing(vectors):  # type: ignore[type-var]
            for shard, made in zip(missing, vectors, strict=True):
                run.write(shard, made, ids.pop(shard))
    return embedder.counts, meter.seconds


class Meter:
    """The progress bar: texts, time left, tokens/s and their useful share of what is computed."""

    def __init__(self, rows: int, done: int) -> None:
        self._bar = _bar("texts", rows, done)
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


def _bar(what: str, total: int, done: int) -> Any:
    from tqdm import tqdm

    seldom = {} if sys.stderr.isatty() else {"mininterval": 30}
    unit = {"desc": what, "unit": " texts"}
    return tqdm(total=total or None, initial=done, leave=False, **unit, **seldom)
