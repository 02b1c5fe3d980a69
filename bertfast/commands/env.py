"""`bertfast env`: what is installed, and which backend works here, or why it doesn't."""

import importlib.metadata
import json
import platform
from collections.abc import Iterator

import torch

from .. import __version__
from ..ops import available, dispatch, tuned
from ..ops.linear import onednn as cpu_linear
from ..ops.native import build_record
from .terminal import GOOD, HEAD, console, paragraph

# How kernels that are for a GPU run on a CPU.
HOW = {
    ("triton", "cpu"): ", in Triton's interpreter: an emulation, for proofs and not for speed",
    ("cuda", "cpu"): ", as a build for the host: an emulation, for proofs and not for speed",
}
# A choice that its backend's name doesn't tell: of a folder of ops.
WORDS = {("linear", "torch"): "two kernels", ("linear_gated", "torch"): "two kernels"}
PACKAGES = ("torch", "triton", "numpy", "transformers", "sentence-transformers", "flash-attn")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    except OSError:
        pass
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
        "auto": _auto() if gpus else {},
    }


def _auto() -> dict:
    """The sources of "auto"'s choices on the GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    file, found = tuned.path(device), tuned.current(device)
    lines = {
        part: {key: choice.chosen for key, choice in choices.items()}
        for part, choices in found._asdict().items()
    }
    orders = {op: dispatch.shipped_order(op, device) for op in dispatch.ops()}
    return {"order": orders, "file": str(file) if file else None, **lines}


def env(as_json: bool = False) -> int:
    facts = describe()
    if as_json:
        print(json.dumps(facts, indent=1))
        return 0
    out = console()
    out.print(f"bertfast {facts['bertfast']}", style=HEAD)
    packages = facts["packages"]
    versions = [f"{name} {version}" for name, version in packages.items() if version]
    out.print(paragraph(f"Python {facts['python']}, {', '.join(versions)}"))
    if absent := [name for name, version in packages.items() if not version]:
        out.print(paragraph(f"not installed, and optional: {', '.join(absent)}"))
    out.print(paragraph(f"{facts['platform']}, {facts['cpu']}"))
    out.print(paragraph("GPU: " + (", ".join(facts["gpus"]) or "none that torch can use")))
    build = facts["build"]
    if build.get("architectures"):
        archs = ", ".join(build["architectures"])
        out.print(paragraph(f"CUDA kernels compiled by nvcc {build['nvcc']} for {archs}"))
    for module in ("_cuda", "_host"):
        if build.get(module):
            out.print(paragraph(f"bertfast.{module} was not built: {build[module]}"))
    used = "used" if facts["onednn"] is None else f"not used: {facts['onednn']}"
    out.print(
        paragraph(
            f"oneDNN's fused products on the CPU: {used} ({cpu_linear.VARIABLE}=0 or 1 decides)"
        )
    )
    for device, ops in facts["backends"].items():
        out.print(f"\nOn the {'GPU' if device == 'cuda' else 'CPU'}", style=HEAD)
        for line, style in backend_lines(device, ops):
            out.print(line, style=style)
    for line in auto_lines(facts["auto"]):
        out.print(line)
    out.print("\nNext: `bertfast verify` checks the numbers of each backend that works here.")
    return 0


def auto_lines(auto: dict) -> Iterator[str]:
    """Lines for all that "auto" follows on the GPU, each with its source."""
    if not auto:
        return
    yield '\n"auto" on the GPU'
    for part in tuned.Tuned._fields:
        for key, chosen in auto[part].items():
            said = in_words(key, chosen) if part == "backends" else chosen
            yield paragraph(f"  {key}: {said}, measured here", indent=4)
    if auto["file"] and not any(auto[part] for part in tuned.Tuned._fields):
        yield paragraph(f"  nothing was measured here: `bertfast tune` writes {auto['file']}", 2)
    usual = dispatch.AUTO_ORDER["cuda"]
    for op, order in auto["order"].items():
        if order != usual:
            first, *more = (in_words(dispatch.ops()[op], backend) for backend in order)
            rest = f"the first of {', '.join((first, *more))} that can run it" if more else first
            text = f"  {op} otherwise: {rest}"
            yield paragraph(text, indent=4)
    text = f"  everything else: the first of {', '.join(usual)} that can run it"
    yield paragraph(text, indent=4)


def in_words(case: str, backend: str) -> str:
    """The choice of a backend for a case, whose name begins with its folder's."""
    return WORDS.get((case.partition(" ")[0], backend), backend)


def backend_lines(
    device: str, ops: dict[str, dict[str, str | None]]
) -> Iterator[tuple[str, str | None]]:
    """A line and its colour for each backend; where ops differ, one for each of the reasons."""
    for backend in dispatch.BACKENDS:
        by_reason: dict[str | None, list[str]] = {}
        for op, backends in ops.items():
            by_reason.setdefault(backends[backend], []).append(op)
        for reason, names in by_reason.items():
            text = f"no: {reason}" if reason else "yes" + (HOW.get((backend, device)) or "")
            which = "" if len(by_reason) == 1 else f"{', '.join(names)}: "
            line = paragraph(f"  {backend:8}{which}{text}", indent=10)
            yield line, GOOD if reason is None else None
