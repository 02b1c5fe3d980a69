"""The process that compiles the Triton kernels for one architecture and reads what came out.

It prints a line of JSON for each kernel, and for each fault.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime.cache import get_cache_manager

from ...ops.aot import Case, Launch
from . import gates
from .recording import aim_at, compiled, record
from .rows import Row, make_row
from .sass import capability, disassemble, read_cubin
from .triton_aot import TAG


@triton.jit
def fill_kernel(out_ptr):  # noqa: ANN001, ANN201
    tl.store(out_ptr + tl.program_id(0), 1.0)


def launch_smallest() -> None:
    """Launches a kernel that compiles for every architecture that Triton knows."""
    fill_kernel[(1,)](torch.empty(1))


def forms(module: ModuleType, fail: Callable[[str], None]) -> Iterator[tuple[Launch, Case]]:
    """The launches of a module's op, each form once, with its description."""
    noted: list[tuple[Launch, Case | None]] = []
    try:
        record(
            module.call_launchers, lambda launch: noted.append((launch, module.triton_case(launch)))
        )
    except Exception as error:
        fail(f"a call in {module.__name__}: {_words(error)}")
    known: dict[tuple[str, str, str], str] = {}
    for launch, case in noted:
        if case is None:
            continue
        form = (launch.name, case.label, case.dtypes)
        if form not in known:
            known[form] = launch.specialization
            yield launch, case
        elif known[form] != launch.specialization:
            fail(f"{', '.join(form)}: two launches of this form are compiled differently")


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def rows(op: str, launch: Launch, case: Case, arch: str, directory: Path) -> Iterator[Row]:
    printed = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        kernel = compiled(launch)
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def ptxas() -> str:
        # What Triton took from its cache is compiled once more, for the compiler's words.
        return printed.getvalue() or _ptxas(kernel.asm["ptx"], arch, directory)

    said = gates.warnings(_kept(cubin, "kernel.log", ptxas))

    def disassembled(cubin: Path) -> str:
        return _kept(cubin, "kernel.sass", lambda: disassemble(cubin))

    for name, (code, resources) in read_cubin(cubin, arch, disassembled).items():
        shared = kernel.metadata.shared
        yield make_row("triton", op, name, arch, case, code, resources, shared, said)


def _ptxas(ptx: str, arch: str, directory: Path) -> str:
    source = directory / "kernel.ptx"
    source.write_text(ptx)
    number = capability(arch)
    command = [get_ptxas(number).path, "-v", f"--gpu-name={sm_arch_from_capability(number)}"]
    command += [str(source), "-o", str(directory / "again.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr


def _kept(cubin: Path, name: str, make: Callable[[], str]) -> str:
    """A text about a cubin, kept beside it in Triton's cache: for small kernels it takes longer
    than all the rest."""
    cache = get_cache_manager(hashlib.sha256(cubin.read_bytes()).hexdigest())
    kept = cache.get_file(name)
    if kept is not None:
        return Path(kept).read_text()
    text = make()
    cache.put(text, name, binary=False)
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arch")
    parser.add_argument("modules", nargs="*")
    args = parser.parse_args()

    def say(**line: object) -> None:
        print(TAG + json.dumps(line), flush=True)

    def fail(text: str) -> None:
        say(failed=f"{text}, on {args.arch}")

    aim_at(capability(args.arch))
    smallest: list[Launch] = []
    record(launch_smallest, smallest.append)
    compiled(smallest[0])
    say(knows=args.arch)
    with tempfile.TemporaryDirectory() as directory:
        for name in args.modules:
            op = name.split(".")[-2] if "." in name else name
            for launch, case in forms(importlib.import_module(name), fail):
                try:
                    for row in rows(op, launch, case, args.arch, Path(directory)):
                        say(row=row.as_dict())
                except Exception as error:
                    fail(f"{launch.name}, {case.label}, {case.dtypes}: {_words(error)}")


if __name__ == "__main__":
    main()
