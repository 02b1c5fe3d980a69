"""Ceilings of this machine, measured: a kernel's time is compared with the floor they make."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ...ops.linear import onednn
from .floor import Ceilings
from .predicted import Gpu
from .record import Row, dtype_name
from .timing import Call, Sample, graph_timer, interleaved, process_timer

HIDDEN, INNER = 768, 3072  # BERT-base's


class Machine:
    """The ceilings of a device; those of a dtype are measured when they are first asked for.

    record is called with a row for everything that was measured.
    """

    def __init__(self, device: str, record: Callable[[Row], None], quick: bool = False) -> None:
        self.device, self.record = device, record
        gpu = device == "cuda"
        self.clock = "device" if gpu else "process"
        self.repeats, self.rows, megabytes = (15, 16384, 2048) if gpu else (5, 1024, 256)
        if quick:
            self.repeats, self.rows, megabytes = 3, 64, 16
        self.bytes_per_s = self._copy(megabytes)
        self.gap_us = self._launch_gap() if gpu else None
        self._known: dict[torch.dtype, Ceilings] = {}

    def model(self, dtype: torch.dtype) -> Gpu | None:
        """The GPU as `predicted` knows it; a CPU isn't modelled."""
        if self.gap_us is None:
            return None
        count = torch.cuda.get_device_properties(0).multi_processor_count
        measured = ((self.rows, INNER, HIDDEN), (self.rows, HIDDEN, INNER))
        return Gpu(self.ceilings(dtype), self.gap_us, count, measured)

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        if dtype not in self._known:
            sizes = ((HIDDEN, INNER), (INNER, HIDDEN))
            rate = max(self._product(dtype, *size) for size in sizes)
            self._known[dtype] = Ceilings(self.bytes_per_s, rate)
        return self._known[dtype]

    def _best(self, ways: Sequence[Sequence[Call]]) -> Sample:
        """The fastest of several ways, each of which is calls after one another."""
        stream = torch.cuda.Stream() if self.device == "cuda" else None
        timers = {
            str(way): graph_timer(calls, stream) if stream else process_timer(calls)
            for way, calls in enumerate(ways)
        }
        samples = interleaved(timers, self.repeats).values()
        return min(samples, key=lambda sample: sample.median)

    def _copy(self, megabytes: int) -> float:
        """Bytes per second of a large copy within the device's memory, read plus written."""
        size = megabytes << 20
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        sample = self._best([[lambda: target.copy_(source)]])
        rate = 2 * size / sample.median * 1e6
        row = Row("torch", "copy", "", f"{megabytes}MB", "uint8", clock=self.clock, cache="cold")
        row.gb_per_s = rate / 1e9
        self.record(row.timed(sample))
        return rate

    def _launch_gap(self) -> float:
        """Microseconds a kernel of a CUDA graph of kernels that do next to nothing."""
        tiny = torch.zeros(1, device="cuda")
        sample = self._best([[lambda: tiny.add_(1.0)] * 1000])
        self.record(Row("torch", "launch gap", "", "1", "fp32").timed(sample))
        return sample.median

    @torch.no_grad()
    def _product(self, dtype: torch.dtype, inner: int, columns: int) -> float:
        """Operations per second of a matrix product of random data at one of BERT's own sizes, by
        the fastest library that is called for it."""
        a = torch.randn(self.rows, inner, device=self.device).to(dtype)
        b = torch.randn(columns, inner, device=self.device).to(dtype)
        ways = [[lambda: F.linear(a, b)]]
        if onednn.serves(a, b, training=False):
            ways.append([lambda: onednn.linear(a, b, None)])
        sample = self._best(ways)
        rate = 2 * self.rows * inner * columns / sample.median * 1e6
        shape = f"{self.rows}x{inner}x{columns}"
        row = Row("torch", "matmul", "forward", shape, dtype_name(dtype), clock=self.clock)
        row.tflop_per_s = rate / 1e12
        self.record(row.timed(sample))
        return rate
