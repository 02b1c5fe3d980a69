"""Shards by Ray Data: actors that each hold the model read rows, and write shards, themselves.

What travels is a shard's number, so the input, the model and the output must lie on disks that all
machines see, under the same paths. An actor that dies is started again, with what it had in hand.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...commands.errors import UserError, need
from .command import Meter
from .embedder import Counts, CrossScorer, Embedder
from .options import EmbedOptions
from .output import Run


class Worker:
    """An actor. It is given a run and what computes it, which loads its model with the first
    shard."""

    def __init__(self, run: Run, embedder: Embedder | CrossScorer, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.run, self.embedder = run, embedder

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {name: [] for name in ("shard", *Counts._fields)}
        for shard in map(int, batch["shard"]):
            before = self.embedder.counts
            if not self.run.has(shard):  # another actor may have died after it
                items, keys = self.run.read(shard)
                (made,) = self.embedder.windows([items])
                self.run.write(shard, made, keys)
            counts = self.embedder.counts - before
            for name, value in zip(found, (shard, *counts), strict=True):
                found[name].append(value)
        return found


@dataclass(frozen=True)
class Cluster:
    """Ray, connected, and what of it is used."""

    ray: Any
    gpus: int
    workers: int

    @property
    def device(self) -> torch.device:
        """Of its actors."""
        return torch.device("cuda" if self.gpus else "cpu")


@contextlib.contextmanager
def connected(options: EmbedOptions) -> Iterator[Cluster]:
    need("--ray", ("ray",), "scale")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = options.ray or "local"
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray: {address!r} can't be reached: {error}") from None
    try:
        found = ray.cluster_resources()
        gpus = 0 if options.device == "cpu" else int(found.get("GPU", 0))
        if options.device.startswith("cuda") and not gpus:
            raise UserError(f"--device is {options.device}, and Ray has no GPU")
        yield Cluster(ray, gpus, options.workers or gpus or int(found.get("CPU", 1)))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        lines = str(cause).strip().splitlines() or [""]
        raise UserError(f"--ray: an actor failed: {type(cause).__name__}: {lines[-1]}") from error
    finally:
        ray.shutdown()


def on_ray(
    cluster: Cluster, run: Run, embedder: Embedder | CrossScorer, missing: list[int]
) -> tuple[Counts, float]:
    with Meter(run, missing) as meter:
        counts = Counts()
        for row in _results(cluster, run, embedder, missing):
            made = Counts(*(int(row[name]) for name in Counts._fields))
            meter.add(made._replace(texts=run.count(int(row["shard"]))))
            counts += made
    if left := run.missing():
        raise UserError(
            f"{run.path(left[0]).name} and {len(left) - 1} more aren't in {str(run.folder)!r} "
            "though actors wrote them: it must lie on a disk that all machines of the cluster see"
        )
    return counts, meter.seconds


def _results(
    cluster: Cluster, run: Run, embedder: Embedder | CrossScorer, missing: list[int]
) -> Iterator[dict[str, Any]]:
    import ray.data

    gpus, workers = cluster.gpus, min(cluster.workers, len(missing))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    items = [{"shard": shard} for shard in missing]
    needs: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    # A block for each shard, made here: a task to make them would wait for a CPU that actors hold.
    made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Worker,
        fn_constructor_args=(run, embedder, None if gpus else 1),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        **needs,
    )
    yield from made.iter_rows()
