"""The processes of a run: torchrun's, or this one alone.

DDP averages gradients over processes, and FSDP2 does too. The loss is divided by what all of them
count together, so it is multiplied by their number before the backward.
"""

import contextlib
import datetime
import inspect
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ...commands.errors import UserError


class FirstFailed(UserError):
    """An error of the first process, which tells the user."""


T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    rank: int
    world: int
    device: torch.device
    group: Any = None  # by which the first tells the others; None: torch's default

    @property
    def first(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over all processes, in float64, on the host."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def by_first(self, make: Callable[[], T]) -> T:
        """The result of `make` in the first process, for all of them; if it raises UserError there,
        they all do."""
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = str(error)
            except BaseException as error:  # the others would wait for ever
                box[1] = f"{type(error).__name__}: {error}"
                dist.broadcast_object_list(box, group=self.group)
                raise
        dist.broadcast_object_list(box, group=self.group)
        if box[1] is not None:
            raise UserError(box[1]) if self.first else FirstFailed(box[1])
        return box[0]

    def same_everywhere(self, what: str, value: object) -> None:
        """Raises UserError in all processes where one has another value than the first."""
        if self.world == 1:
            return
        ours = pickle.dumps(value)
        theirs: list[Any] = [None] * self.world
        dist.all_gather_object(theirs, ours)
        different = [rank for rank, other in enumerate(theirs) if other != theirs[0]]
        if different:
            raise UserError(f"{what} must be the same in all processes; not in {different}")


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connects the processes that torchrun started, unless they are connected. Once for all
    commands of a file: what a first connection left with torchrun would disturb a second one."""
    if dist.is_initialized() or "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    # Counts and decisions travel by gloo between hosts, so that no GPU has to be waited for.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def started(device: str, patient: bool = False) -> Iterator[Processes]:
    """The processes that torchrun started, connected; or this one alone. device: "auto", "cpu" or
    "cuda". patient: the others wait for the first as long as it takes."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use, and there is none")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    with connected():
        if not dist.is_initialized():
            yield Processes(0, 1, torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
            return
        place = torch.device("cpu")
        if on_gpu:
            local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= there:
                raise UserError(
                    f"process {local} of this machine has no GPU: there are {there}. Start no "
                    "more processes a machine than GPUs"
                )
            place = torch.device("cuda", local)
            torch.cuda.set_device(place)
        group = dist.new_group(backend="gloo", timeout=_PATIENCE) if patient else None
        yield Processes(dist.get_rank(), dist.get_world_size(), place, group)


@dataclass(frozen=True)
class Shared:
    """The model as all processes train it: `call` runs it, `module` has its parameters."""

    module: nn.Module
    call: Any
    fsdp: bool

    @contextlib.contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward: gradients are averaged after the step's
        last one."""
        if self.fsdp:
            self.call.set_requires_gradient_sync(last)
            yield
        elif self.call is not self.module and not last:
            with self.call.no_sync():
                yield
        else:
            yield


def share(module: nn.Module, processes: Processes, fsdp: bool, compiled: bool = False) -> Shared:
    """The model on the processes' devices, by DDP, or with `fsdp` sharded by FSDP2, each layer and
    the rest."""
    module.to(processes.device)
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if compiled:
            raise UserError("--compile can't be had with --fsdp: take one of them")
        if not dist.is_initialized():
            raise UserError("--fsdp shards a model over processes: start them by torchrun")
        mesh = init_device_mesh(processes.device.type, (processes.world,))
        inner: Any = module
        for layer in inner.model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return Shared(module, module, True)
    call: Any = module
    if processes.world > 1:
        from torch.nn.parallel import DistributedDataParallel

        # BERT's buffers are constants. Newer versions of torch have another name for it.
        options = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        more: dict[str, Any] = {name: False}
        call = DistributedDataParallel(module, gradient_as_bucket_view=True, **more)
    if compiled:
        call.compile(dynamic=True)  # no two batches have the same sizes
    return Shared(module, call, False)
