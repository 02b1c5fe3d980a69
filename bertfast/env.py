"""`bertfast env`: what is installed, and which backend works here, or why it doesn't."""

import importlib.metadata
import json
import platform

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import __version__, cpu_linear
from .ops import available
from .ops.native import build_record

PACKAGES = ("torch", "triton", "numpy", "transformers", "sentence-transformers", "flash-attn")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(
                line.split(":")[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe() -> dict:
    """Everything that `bertfast env` prints."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    return {
        "bertfast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "gpus": gpus,
        "packages": {name: _version(name) for name in PACKAGES},
        "build": build_record(),
        "onednn": cpu_linear.why_not(),
        "backends": {device: available(device) for device in devices},
    }


def env(as_json: bool = False) -> None:
    facts = describe()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    console = Console(highlight=False)
    versions = ", ".join(f"{k} {v}" for k, v in facts["packages"].items() if v)
    console.print(f"bertfast {facts['bertfast']}, Python {facts['python']}, {versions}")
    missing = ", ".join(k for k, v in facts["packages"].items() if not v)
    console.print(f"not installed: {missing}" if missing else "all optional packages are installed")
    console.print(f"{facts['platform']}, {facts['cpu']}")
    console.print("GPU: " + (", ".join(facts["gpus"]) or "none that torch can use"))
    build = facts["build"]
    if build.get("architectures"):
        console.print(f"compiled by nvcc {build['nvcc']} for {', '.join(build['architectures'])}")
    for module in ("_cuda", "_host"):
        if build.get(module):
            console.print(f"bertfast.{module} was not built: {build[module]}")
    used = "used" if facts["onednn"] is None else f"not used: {facts['onednn']}"
    console.print(
        f"oneDNN's fused products on the CPU: {used} ({cpu_linear.VARIABLE}=0 or 1 decides)"
    )
    table = Table(title="Backends", box=box.SIMPLE_HEAD)
    for heading in ("device", "op", "backend", "works"):
        table.add_column(heading)
    for device, ops in facts["backends"].items():
        for op, backends in ops.items():
            for backend, reason in backends.items():
                table.add_row(
                    device, op, backend, "[green]yes[/]" if not reason else f"no: {reason}"
                )
    console.print(table)
    console.print("Next: `bertfast verify` checks the numbers of each backend that works here.")
