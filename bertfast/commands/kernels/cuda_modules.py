"""Reads the CUDA kernels: from the machine code that `bertfast._cuda` carries for each architecture
or, where that isn't built, compiled from a source checkout by nvcc."""

import ctypes
import importlib.util
import json
import re
import tempfile
from pathlib import Path

import bertfast

from ...ops.aot import Case
from . import gates
from .rows import Row, aot_modules, make_row
from .sass import MissingTool, capability, read_cubin, run_tool

PACKAGE = Path(bertfast.__file__).parent
SOURCES = PACKAGE.parent / "csrc"
NVCC_FLAGS = ["-std=c++17", "--expt-relaxed-constexpr"]


class LeftOut(Exception):
    """It can't be read on this machine; the text says why."""


def module_path() -> Path | None:
    spec = importlib.util.find_spec("bertfast._cuda")
    return Path(spec.origin) if spec is not None and spec.origin else None


def version() -> str | None:
    """The release of the nvcc that compiled what is read."""
    if module_path() is not None and (record := _build_record()):
        return record.get("nvcc")
    try:
        said = run_tool("nvcc", "--version")
    except MissingTool:
        return None
    found = re.search(r"V([\d.]+)", said)
    return found[1] if found else None


def _build_record() -> dict:
    path = PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read(arch: str, op: str | None = None) -> list[Row]:
    """The rows of all CUDA kernels for an architecture."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        cubins = _extract(arch, directory) if module_path() else _compile(arch, directory)
        kernels = [
            (item, said) for cubin, said in cubins for item in read_cubin(cubin, arch).items()
        ]
    rows = []
    for (mangled, (code, resources)), said in kernels:
        kernel, arguments = template(demangle(mangled))
        op_name, case = _describe(kernel, arguments)
        if op in (None, op_name) and case.is_on(capability(arch)):
            shared = case.dynamic_shared
            form = ("cuda", op_name, kernel, arch, case, code, resources, shared)
            rows.append(make_row(*form, gates.warnings(said, mangled)))
    return rows


def _extract(arch: str, directory: Path) -> list[tuple[Path, str]]:
    """The module's cubins, and what the compiler said of wgmma when it was built."""
    module = module_path()
    assert module is not None
    has = re.findall(r"\.(sm_\w+)\.cubin", run_tool("cuobjdump", "-lelf", str(module)))
    if arch not in has:
        found = ", ".join(sorted(set(has))) or "no architecture"
        raise LeftOut(f"{module.name} is compiled for {found}, not for {arch}")
    run_tool("cuobjdump", "-xelf", f".{arch}.", str(module), cwd=directory)
    said = "\n".join(_build_record().get("remarks", ())) if capability(arch) == 90 else ""
    return [(cubin, said) for cubin in sorted(directory.glob("*.cubin"))]


def _compile(arch: str, directory: Path) -> list[tuple[Path, str]]:
    """A cubin of each source, and what the compiler said of it."""
    if not SOURCES.is_dir():
        raise LeftOut("bertfast._cuda is not built, and this is no source checkout")
    try:
        known = run_tool("nvcc", "--list-gpu-code").split()
    except MissingTool as missing:
        raise LeftOut(f"bertfast._cuda is not built, and {missing}") from None
    if arch.rstrip("af") not in known:
        raise LeftOut(f"bertfast._cuda is not built, and nvcc {version()} can't compile for {arch}")
    cubins = []
    for source in sorted(SOURCES.glob("kernels/**/*.cu")):
        cubin = directory / f"{source.parent.name}_{source.stem}.cubin"
        said: list[str] = []
        flags = [*NVCC_FLAGS, f"-I{SOURCES}", f"-arch={arch}", "-cubin", "-Xptxas=-v"]
        run_tool("nvcc", *flags, "-o", str(cubin), str(source), hear=said.append)
        cubins.append((cubin, "".join(said)))
    return cubins


def demangle(name: str) -> str:
    """By the C++ library that torch has loaded anyway: c++filt needn't be installed."""
    library = ctypes.CDLL("libstdc++.so.6")
    function = getattr(library, "__cxa_demangle")  # noqa: B009 (a class would mangle it)
    function.restype = ctypes.c_void_p
    status = ctypes.c_int()
    result = function(name.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        return name
    text = ctypes.string_at(result).decode()
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    free(result)
    return text


def template(demangled: str) -> tuple[str, list[str]]:
    """A kernel's own name and its template arguments, without namespaces."""
    text = demangled.replace("(anonymous namespace)", "anonymous").removeprefix("void ")
    text = re.sub(r"\b(?:\w+::)+", "", text)
    name = re.match(r"\w+", text)
    if name is None or text[name.end() : name.end() + 1] != "<":
        return (name[0] if name else text), []
    arguments, depth = [""], 0
    for character in text[name.end() + 1 :]:
        depth += {"<": 1, ">": -1, "(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            break
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return name[0], [argument.strip() for argument in arguments]


def _describe(kernel: str, arguments: list[str]) -> tuple[str, Case]:
    for op, module in aot_modules().items():
        case = module.cuda_case(kernel, arguments)
        if case is not None:
            return op, case
    # Nobody knows it. It is listed all the same, and fails for want of a budget line.
    return "?", Case(", ".join(arguments) or "-", "?", 0, None)
