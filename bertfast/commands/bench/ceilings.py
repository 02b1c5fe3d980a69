"""What this machine can do, measured: the floors that a kernel's time is compared with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...ops.linear import onednn as cpu_linear
from .floor import Ceilings
from .record import Row, dtype_name
from .timing import Sample, Timer, graph_timer, interleaved, process_timer

HIDDEN, INNER = 768, 3072  # BERT-base's


@dataclass(frozen=True)
class Copy:
    sample: Sample
    bytes: int  # read plus written

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.sample.median * 1e6


@dataclass(frozen=True)
class Product:
    rows: int
    inner: int
    columns: int
    sample: Sample

    @property
    def flop_per_s(self) -> float:
        return 2 * self.rows * self.inner * self.columns / self.sample.median * 1e6


def _timer(calls: list[Callable], device: str) -> Timer:
    if device == "cuda":
        return graph_timer(calls, torch.cuda.Stream())
    return process_timer(calls)


def copy_bandwidth(device: str, megabytes: int, repeats: int) -> Copy:
    """One large copy within the device's memory, counting what is read and what is written."""
    size = megabytes << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timer = _timer([lambda: target.copy_(source)], device)
    return Copy(interleaved({"copy": timer}, repeats)["copy"], 2 * size)


def launch_gap(repeats: int) -> Sample:
    """Time per kernel of a CUDA graph of kernels that do next to nothing."""
    tiny = torch.zeros(1, device="cuda")
    calls = [lambda: tiny.add_(1.0)] * 1000
    return interleaved({"gap": graph_timer(calls, torch.cuda.Stream())}, repeats)["gap"]


def product_rates(device: str, rows: int, dtype: torch.dtype, repeats: int) -> list[Product]:
    """Matrix products at BERT's own inner sizes, by the libraries that torch calls; random data."""
    products = []
    for inner, columns in ((HIDDEN, INNER), (INNER, HIDDEN)):
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(columns, inner, device=device).to(dtype)
        timers = {"linear": _timer([lambda a=a, b=b: F.linear(a, b)], device)}
        with torch.no_grad():
            if cpu_linear.serves(a, training=False):  # the faster library of the two is the ceiling
                call = [lambda a=a, b=b: cpu_linear.linear(a, b, None)]
                timers["oneDNN"] = _timer(call, device)
            samples = interleaved(timers, repeats)
        best = min(samples.values(), key=lambda sample: sample.median)
        products.append(Product(rows, inner, columns, best))
    return products


class Machine:
    """The ceilings of a device; those of a dtype are measured when they are first asked for.

    record is called with a row for everything that was measured.
    """

    def __init__(self, device: str, record: Callable[[Row], None], quick: bool = False):
        self.device, self.record = device, record
        self.clock = "device" if device == "cuda" else "process"
        gpu = device == "cuda"
        self.repeats = 15 if gpu else 5
        self.rows = 16384 if gpu else 1024
        megabytes = 2048 if gpu else 256
        if quick:
            self.repeats, self.rows, megabytes = 3, 64, 16
        self.copy = copy_bandwidth(device, megabytes, self.repeats)
        row = Row("torch", "copy", "", f"{megabytes}MB", "uint8", clock=self.clock, cache="cold")
        row.gb_per_s = self.copy.bytes_per_s / 1e9
        record(row.timed(self.copy.sample))
        if gpu:
            record(Row("torch", "launch gap", "", "1", "fp32").timed(launch_gap(self.repeats)))
        self._known: dict[torch.dtype, Ceilings] = {}

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        if dtype not in self._known:
            products = product_rates(self.device, self.rows, dtype, self.repeats)
            for product in products:
                shape = f"{product.rows}x{product.inner}x{product.columns}"
                row = Row("torch", "matmul", "forward", shape, dtype_name(dtype), clock=self.clock)
                row.tflop_per_s = product.flop_per_s / 1e12
                self.record(row.timed(product.sample))
            rate = max(product.flop_per_s for product in products)
            self._known[dtype] = Ceilings(self.copy.bytes_per_s, rate)
        return self._known[dtype]
