"""Compiles the Triton kernels ahead of time and reads what came out. No GPU is needed.

A process of its own for each architecture: compilation fails where Triton's interpreter is on, and
an architecture that the installed Triton doesn't know can take the whole process down.
"""

import argparse
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import bertfast

from ...ops.aot import Case, TritonCase
from .rows import Row, aot_modules, make_row
from .sass import capability, disassemble, read_cubin

TAG = "bertfast kernels: "  # starts the subprocess's lines: a compiler may print too


class LeftOut(Exception):
    """This machine can't compile for it; the text says why."""


def version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def read(
    arch: str, modules: list[str], seen: Callable[[Row], None] = lambda row: None
) -> tuple[list[Row], list[str]]:
    """The rows of the modules' Triton kernels for an architecture, and what failed to compile.

    seen: called with each row as soon as it is there.
    """
    if version() is None:
        raise LeftOut("Triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    package = str(Path(bertfast.__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", __name__, arch, *modules]
    said, rows = [], []
    # Its errors go into a file: nobody reads that pipe while the other one is read.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        for line in process.stdout:
            before, tag, after = line.partition(TAG)
            if tag and not before:
                said.append(json.loads(after))
                if "row" in said[-1]:
                    rows.append(_row(said[-1]["row"]))
                    seen(rows[-1])
        status = process.wait()
        errors.seek(0)
        complaints = errors.read().strip().splitlines() or [f"exit status {status}"]
    end = next((line for line in complaints if "fatal" in line), complaints[-1])
    if {"knows": arch} not in said:
        raise LeftOut(f"Triton {version()} can't compile for {arch}: {end}")
    failures = [line["failed"] for line in said if "failed" in line]
    if status != 0:
        failures.append(f"the compiling process ended after {len(rows)} kernels: {end}")
    return rows, failures


def _row(fields: dict) -> Row:
    for name in ("loads", "stores"):  # JSON's keys are strings
        fields[name] = {int(bits): count for bits, count in fields[name].items()}
    return Row(**fields)


def compile_case(case: TritonCase, arch: str):
    """Triton's compiled kernel, with its cubin in asm["cubin"]."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    names = case.kernel.arg_names
    if set(names) != set(case.arguments):
        wrong = sorted(set(names) ^ set(case.arguments))
        raise TypeError(f"{case.kernel.__name__} and its case differ in {', '.join(wrong)}")
    for index, name in enumerate(names):
        value = case.arguments[name]
        if isinstance(value, str):
            signature[name], _, divisor = value.partition(":")
            if divisor:
                attributes[(index,)] = [["tt.divisibility", int(divisor)]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = value
    source = ASTSource(case.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability(arch), 32)
    return triton.compile(source, target=target, options={"num_warps": case.num_warps})


def _compiled_rows(op: str, case: TritonCase, arch: str, directory: Path) -> Iterator[Row]:
    compiled = compile_case(case, arch)
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    for name, (code, resources) in read_cubin(cubin, arch, _disassemble).items():
        shared = compiled.metadata.shared
        yield make_row("triton", op, name, arch, case.case, code, resources, shared)


def _disassemble(cubin: Path) -> str:
    """Kept beside the cubin in Triton's cache: for small kernels it takes longer than the rest."""
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(cubin.read_bytes()).hexdigest())
    kept = cache.get_file("kernel.sass")
    if kept is not None:
        return Path(kept).read_text()
    text = disassemble(cubin)
    cache.put(text, "kernel.sass", binary=False)
    return text


def _smallest_case() -> TritonCase:
    from .smallest import fill_kernel

    case = Case("smallest", "float32", threads=32, elements=1)
    return TritonCase(fill_kernel, {"out_ptr": "*fp32"}, 1, case)


def _cases(module: ModuleType, arch: str) -> Iterable[TritonCase]:
    """The module's; where configurations differ between architectures, those of this one."""
    if inspect.signature(module.triton_cases).parameters:
        return module.triton_cases(capability(arch))
    return module.triton_cases()


def main() -> None:
    """The subprocess: one line of JSON for each row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arch")
    parser.add_argument("modules", nargs="*")
    args = parser.parse_args()

    def say(**line: object) -> None:
        print(TAG + json.dumps(line), flush=True)

    compile_case(_smallest_case(), args.arch)
    say(knows=args.arch)
    names = args.modules or [module.__name__ for module in aot_modules().values()]
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            op = name.split(".")[-2] if "." in name else name
            for case in _cases(importlib.import_module(name), args.arch):
                try:
                    for row in _compiled_rows(op, case, args.arch, Path(directory)):
                        say(row=row.as_dict())
                except Exception as error:
                    first = str(error).strip().partition("\n")[0]
                    what = f"{case.kernel.__name__}, {case.case.label}, {case.case.dtypes}"
                    say(failed=f"{what} on {args.arch}: {type(error).__name__}: {first}")


if __name__ == "__main__":
    main()
