"""The toy op's timed cases."""

from dataclasses import dataclass

import torch
from bertfast.ops.toy import toy

from bertfast.commands.bench.case import normal
from bertfast.commands.bench.floor import Work
from bertfast.commands.bench.op_case import Inputs, OpCase


@dataclass(frozen=True)
class ToyCase(OpCase):
    size: int
    pass_: str = "forward"
    dtype: torch.dtype = torch.float32

    op = "toy"
    functions = {"bertfast": lambda backend: toy, "torch eager": lambda x: x + x}
    dropout = 0.0

    @property
    def shape(self) -> str:
        return str(self.size)

    def work(self) -> list[Work]:
        return [Work("memory", 0, 2 * self.size * self.dtype.itemsize)]

    def inputs(self, device: str, seed: int) -> Inputs:
        values = normal(device, seed, self.dtype)
        return Inputs({"x": values(self.size)}, values(self.size))


def gpu_cases() -> list[ToyCase]:
    return []


def cpu_cases() -> list[ToyCase]:
    return [ToyCase(64)]


def dry_cases() -> list[ToyCase]:
    return [ToyCase(64)]
