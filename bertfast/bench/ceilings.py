"""What this machine can do, measured: the floors that a kernel's time is compared with."""

from dataclasses import dataclass

import torch

from .timing import Sample, graph_timer, interleaved, wall_timer

HIDDEN, INNER = 768, 3072  # BERT-base's


@dataclass(frozen=True)
class Copy:
    sample: Sample
    bytes: int  # read plus written

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.sample.median * 1e6


def copy_bandwidth(device: str, megabytes: int, repeats: int) -> Copy:
    """One large copy within the device's memory, counting what is read and what is written."""
    size = megabytes << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    if device == "cuda":
        timer = graph_timer([lambda: target.copy_(source)], torch.cuda.Stream())
    else:
        timer = wall_timer([lambda: target.copy_(source)])
    return Copy(interleaved({"copy": timer}, repeats)["copy"], 2 * size)


def launch_gap(repeats: int) -> Sample:
    """Time per kernel of a CUDA graph of kernels that do next to nothing."""
    tiny = torch.zeros(1, device="cuda")
    calls = [lambda: tiny.add_(1.0)] * 1000
    return interleaved({"gap": graph_timer(calls, torch.cuda.Stream())}, repeats)["gap"]


@dataclass(frozen=True)
class Product:
    rows: int
    inner: int
    columns: int
    sample: Sample

    @property
    def flop_per_s(self) -> float:
        return 2 * self.rows * self.inner * self.columns / self.sample.median * 1e6


def product_rates(device: str, rows: int, dtype: torch.dtype, repeats: int) -> list[Product]:
    """Matrix products at BERT's own inner sizes, by the library that torch calls; random data."""
    products = []
    for inner, columns in ((HIDDEN, INNER), (INNER, HIDDEN)):
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(columns, inner, device=device).to(dtype)
        call = [lambda a=a, b=b: torch.nn.functional.linear(a, b)]
        timer = graph_timer(call, torch.cuda.Stream()) if device == "cuda" else wall_timer(call)
        sample = interleaved({"product": timer}, repeats)["product"]
        products.append(Product(rows, inner, columns, sample))
    return products
