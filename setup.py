"""Builds bertfast's two optional modules from the same kernel sources, csrc/kernels/**/*.cu.

`bertfast._cuda` is compiled by nvcc for GPUs, `bertfast._host` by g++ for a CPU (csrc/host stands
in for CUDA). Neither needs torch. What is built is decided like this, never by a visible GPU:

  BERTFAST_CUDA, BERTFAST_HOST   unset: build if the compiler is there, and carry on if that fails
                                 0: do not build        1: must build, anything else is an error
  BERTFAST_CUDA_ARCHS            such as "sm_80,sm_90a"; default: the ones below that nvcc knows
  BERTFAST_SANITIZE=address      build `_host` under AddressSanitizer
  CXX, CUDA_HOME                 the C++ compiler; where nvcc is looked for before PATH

The outcome (which module, why not, for what, with what, and what `bertfast kernels` has to know of
ptxas's remarks) goes into bertfast/_build.json. A wheel
without any module is tagged py3-none-any. Objects are kept in build/, so that building again
compiles only what changed: `python setup.py build_ext --inplace` is a developer's rebuild.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

DEFAULT_ARCHS = ("sm_80", "sm_86", "sm_90a", "sm_100", "sm_120")  # sm_86's runs on 8.9 too
# Of these kernels shared memory decides how many registers a thread may have: with heads of 64,
# three blocks fit a multiprocessor that has 164 kB, and two one of 100. The others take sm_80's
# code to 8.6 and 8.9, where nothing of it would be different.
BY_SHARED_MEMORY = tuple(
    f"csrc/kernels/attention/{name}.cu" for name in ("forward", "backward_dq", "backward_dkv")
)
# nvcc takes longer to make PTX than to make machine code of it, and a newer architecture's can be
# made of an older one's PTX. So what begins at one of these capabilities shares it, up to the next:
# some kernels have code for 9.0a alone, or for 10.0 and later, and where products are made nvcc
# does better for 10.0. LayerNorm's, which wait for memory, take longest to compile, and share more.
GENERATIONS, GENERATIONS_OF_LAYER_NORM = (80, 90, 100), (80, 90)
LAYER_NORM = "csrc/kernels/layer_norm.cu"
# Files that choose between kernels and have none, and those whose kernels are for Hopper alone: no
# other GPU's launches ask for these. Each architecture would cost a second or more for nothing.
WITHOUT_KERNELS = ("/launch.cu",)
FOR_HOPPER = ("_bulk.cu", "_ping_pong.cu")
DEFAULT_CUDA_HOME = "/usr/local/cuda"
HOW_TO_GET_NVCC = (
    "nvcc was not found in $CUDA_HOME/bin, on PATH or in the default place for the CUDA toolkit; "
    "install the toolkit (12.4 or later) or set CUDA_HOME, then install bertfast again"
)


class NotBuilt(Exception):
    """A module is left out; the text says why."""


def switch(name: str, env: Mapping[str, str]) -> str:
    """The value of BERTFAST_CUDA or BERTFAST_HOST: "" (decide by the compiler), "0" or "1"."""
    value = env.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"bertfast: {name} must be 0, 1 or unset, got {value!r}")
    return value


def cxx(env: Mapping[str, str]) -> list[str]:
    """The C++ compiler as the start of a command line."""
    command = shlex.split(env.get("CXX", "")) or ["g++"]
    if shutil.which(command[0], path=env.get("PATH", "")) is None:
        raise NotBuilt(
            f"the C++ compiler {command[0]} was not found on PATH; install g++ or set CXX, then "
            "install bertfast again"
        )
    return command


def nvcc(env: Mapping[str, str]) -> str:
    """nvcc's path."""
    homes = [env["CUDA_HOME"]] if env.get("CUDA_HOME") else []
    places = [str(Path(home, "bin")) for home in homes]
    places += [env.get("PATH", ""), str(Path(DEFAULT_CUDA_HOME, "bin"))]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    if found is None:
        raise NotBuilt(HOW_TO_GET_NVCC)
    return found


def cores() -> int:
    return len(os.sched_getaffinity(0))


def output(*command: str) -> str:
    """The output of a quick command, or nothing where it fails."""
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return result.stdout.strip() if result.returncode == 0 else ""


def architectures(compiler: str, env: Mapping[str, str]) -> list[str]:
    """The GPU architectures to compile for, oldest first."""
    asked = re.split(r"[,;\s]+", env.get("BERTFAST_CUDA_ARCHS", "").strip())
    if asked == [""]:
        known = output(compiler, "--list-gpu-code").split()
        asked = [arch for arch in DEFAULT_ARCHS if arch.rstrip("a") in known] or ["sm_80"]
    for arch in asked:
        if not re.fullmatch(r"sm_\d+[af]?", arch):
            raise SystemExit(f"bertfast: BERTFAST_CUDA_ARCHS: expected sm_NN or sm_NNa, got {arch}")
    return sorted(set(asked), key=number)


def number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def gencode(groups: list[list[str]], portable: bool = True) -> list[str]:
    """nvcc's flags: machine code for each architecture, made of the PTX of its group's oldest; and
    of what is portable that of the oldest, for GPUs between them that none of it is for (Jetson
    Thor's sm_110), and of the newest group for newer ones."""
    pairs = []
    for group in groups:
        oldest = f"sm_{number(group[0])}" if len(group) > 1 else group[0]
        pairs += [(oldest.replace("sm", "compute"), arch) for arch in group]
    for group in (groups[0], groups[-1]) if portable else ():
        ptx = f"compute_{number(group[0])}"  # that of an sm_NNa runs on nothing newer
        pairs.append((ptx, ptx))
    return [f"-gencode=arch={virtual},code={real}" for virtual, real in dict.fromkeys(pairs)]


def archs_of(source: str, archs: list[str]) -> list[list[str]]:
    """Those of `archs` that a kernel source is compiled for, in groups of the same PTX."""
    if source.endswith(WITHOUT_KERNELS + FOR_HOPPER):
        hopper = [arch for arch in archs if arch == "sm_90a" and source.endswith(FOR_HOPPER)]
        return [hopper or archs[:1]]
    if source in BY_SHARED_MEMORY:
        return [[arch] for arch in archs]
    if "sm_80" in archs:
        archs = [arch for arch in archs if arch not in ("sm_86", "sm_87", "sm_89")]
    begin = GENERATIONS_OF_LAYER_NORM if source == LAYER_NORM else GENERATIONS
    generations = itertools.groupby(archs, lambda arch: bisect.bisect(begin, number(arch)))
    return [list(group) for _, group in generations]


@dataclass
class Recipe:
    """How one module is compiled: a command for each source, and one to link."""

    compile: dict[str, list[str]]  # source -> command, but for input, output and dependencies
    link: list[str]
    flags: list[str]  # those that matter to the kernels, for the record
    directory: str
    facts: dict[str, object]

    def object_of(self, source: str) -> str:
        return f"{self.directory}/{source.removeprefix(self.directory + '/')}.o"


def sources(pattern: str) -> list[str]:
    return sorted(path.as_posix() for path in Path("csrc").glob(pattern))


def bindings(directory: str) -> str:
    """The source of all bindings in one: apart, the compiler would make pybind11's own functions
    for each, and take five times as long."""
    path = Path(directory, "bindings.cpp")
    files = sources("bindings/*.cpp")
    text = "".join(f'#include "{file.removeprefix("csrc/")}"\n' for file in files)
    if not path.exists() or path.read_text() != text:  # or it would be compiled again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path.as_posix()


def binding_flags(module: str) -> list[str]:
    import pybind11

    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    return [f"-DBERTFAST_MODULE={module}", *(f"-I{directory}" for directory in includes)]


def cuda_recipe(env: Mapping[str, str]) -> Recipe:
    compiler = nvcc(env)
    archs = architectures(compiler, env)
    # As nvcc calls the C++ compiler for the bindings too, nobody has to find CUDA's headers.
    base = [compiler, *(["-ccbin", *cxx(env)[:1]] if env.get("CXX") else [])]
    # -O2 is for what runs on the host; the kernels' machine code is the same by any.
    common = ["-std=c++17", "-O2", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    # Compressed, the module is a fifth as large; this form is the one that every driver reads.
    flags = [*common, "--expt-relaxed-constexpr", "-Xfatbin=-compress-all"]
    threads = f"--threads={min(cores(), len(archs))}"  # ninja has few files to spread over cores
    verbose = "-Xptxas=-v"  # or it doesn't say that it made wgmma wait
    commands = {}
    for source in sources("kernels/**/*.cu"):
        own = archs_of(source, archs)
        is_hoppers = source.endswith(FOR_HOPPER) and own == [["sm_90a"]]
        code = gencode(own, not is_hoppers and not source.endswith(WITHOUT_KERNELS))
        commands[source] = [*base, *flags, *code, threads, verbose]
    directory = "build/cuda"
    commands[bindings(directory)] = [*base, *common, *binding_flags("_cuda")]
    # The static runtime needs neither the toolkit nor a driver at import. Its symbols stay inside,
    # lest torch's own copy of the runtime answers for some of them.
    link = [*base, "-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL,-s"]
    release = re.search(r"V([\d.]+)", output(compiler, "--version"))
    facts = {"architectures": archs, "nvcc": release[1] if release else "unknown"}
    return Recipe(commands, link, flags, directory, facts)


def host_recipe(env: Mapping[str, str]) -> Recipe:
    compiler = cxx(env)
    sanitize = env.get("BERTFAST_SANITIZE", "").strip()
    if sanitize not in ("", "address"):
        raise SystemExit(f"bertfast: BERTFAST_SANITIZE must be address or unset, got {sanitize!r}")
    speed = ["-O2"]
    if sanitize:
        speed = ["-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-O1"]
    flags = [
        "-std=c++17",
        *speed,
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-Wno-unknown-pragmas",
        "-fPIC",
        "-fvisibility=hidden",
        "-Icsrc",
    ]
    flags += ["-DBERTFAST_HOST"]
    commands = {source: [*compiler, *flags] for source in sources("host/*.cpp")}
    commands |= {source: [*compiler, *flags, "-xc++"] for source in sources("kernels/**/*.cu")}
    directory = f"build/host{'-' * bool(sanitize)}{sanitize}"
    commands[bindings(directory)] = [*compiler, *flags, *binding_flags("_host")]
    link = [*compiler, "-shared", *(speed[:1] if sanitize else ["-s"]), "-pthread"]
    facts: dict[str, object] = {"cxx": output(*compiler, "--version").partition("\n")[0]}
    return Recipe(commands, link, flags, directory, facts)


def ninja_file(recipe: Recipe, target: str) -> str:
    """build.ninja: an edge for each source, which follows the headers it includes, and a link."""

    def escape(command: list[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    # What a compiler says is kept beside its object, and shown but for ptxas's counts.
    keep = "> $out.said 2>&1; status=$$?"
    show = "grep -v '^ptxas info\\|bytes stack frame' $out.said; exit $$status"
    lines = [
        f"builddir = {recipe.directory}",
        "rule compile",
        f"  command = $compiler -MD -MF $out.d -c $in -o $out {keep}; {show}",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {escape(recipe.link)} $in -o $out",
        "  description = link $out",
    ]
    objects = []
    for source, command in recipe.compile.items():
        objects.append(recipe.object_of(source))
        lines += [f"build {objects[-1]}: compile {source}", f"  compiler = {escape(command)}"]
    lines += [f"build {target}: link {' '.join(objects)}", f"default {target}", ""]
    return "\n".join(lines)


def compile_module(recipe: Recipe, filename: str) -> Path:
    """Runs ninja. The module's file, or NotBuilt with the end of what the compiler said."""
    target = f"{recipe.directory}/{filename}"
    script = Path(recipe.directory, "build.ninja")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(ninja_file(recipe, target))
    command = [sys.executable, "-m", "ninja", "-f", str(script), f"-j{cores()}"]
    said: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=-1, stderr=subprocess.STDOUT, text=True
    ) as ninja:
        for line in ninja.stdout or ():
            print(line, end="", flush=True)
            said.append(line.rstrip())
    if ninja.returncode != 0:
        # Of the first edge that failed: not its name and command, but what the compiler said.
        text = "\n".join(said)
        failed = re.search(r"FAILED: .*\n.*\n((?:(?!\[\d+/|ninja: ).*\n?)*)", text)
        end = (failed[1] if failed else text).strip().splitlines()[-20:]
        raise NotBuilt("its compilation failed:\n" + "\n".join(end))
    return Path(target)


def remarks(recipe: Recipe) -> list[str]:
    """What ptxas said of its own accord (C7519, ...) of what the module is made of."""
    said = [Path(f"{recipe.object_of(source)}.said") for source in recipe.compile]
    lines = [line for path in said if path.exists() for line in path.read_text().splitlines()]
    return sorted({line for line in lines if re.search(r"\(C\d{4}\)", line)})


def build_module(module: str, filename: str, env: Mapping[str, str]) -> tuple[Path | None, dict]:
    """One module: its file, or None, and its part of the record."""
    variable, make_recipe = {
        "_cuda": ("BERTFAST_CUDA", cuda_recipe),
        "_host": ("BERTFAST_HOST", host_recipe),
    }[module]
    wanted = switch(variable, env)
    record: dict = {"flags": {}}
    try:
        if wanted == "0":
            raise NotBuilt(f"{variable}=0 was set when bertfast was installed")
        if sys.platform != "linux":
            raise NotBuilt(f"the compiled modules are for Linux, this is {sys.platform}")
        recipe = make_recipe(env)
        record |= recipe.facts | {"flags": {module: shlex.join(recipe.flags)}}
        path = compile_module(recipe, filename)
        if module == "_cuda":
            record["remarks"] = remarks(recipe)
        return path, record | {module: None}
    except NotBuilt as reason:
        if wanted == "1":
            raise SystemExit(f"bertfast: {variable}=1, but {reason}") from None
        print(f"bertfast.{module} is left out: {reason}")
        return None, record | {module: str(reason)}


class BuildModules(build_ext):
    """Compiles what can be compiled, and puts it and _build.json into the package."""

    def run(self) -> None:
        package = Path("bertfast") if self.inplace else Path(self.build_lib, "bertfast")
        package.mkdir(parents=True, exist_ok=True)
        record: dict = {"architectures": [], "nvcc": None, "cxx": None, "flags": {}}
        built = []
        for extension in self.extensions:
            target = package / Path(self.get_ext_filename(extension.name)).name
            target.unlink(missing_ok=True)  # an earlier install's, which nothing below may leave
            module = extension.name.rpartition(".")[2]
            path, part = build_module(module, target.name, os.environ)
            part["flags"] = record["flags"] | part["flags"]
            record |= part
            if path is not None:
                shutil.copy2(path, target)
                built.append(extension)
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")
        self.distribution.ext_modules = built  # a distribution without any is a pure one


class Wheel(bdist_wheel):
    """Builds first, as only then is it known whether the wheel is tied to a platform."""

    def run(self) -> None:
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def main() -> None:
    setup(
        ext_modules=[Extension("bertfast._cuda", []), Extension("bertfast._host", [])],
        cmdclass={"build_ext": BuildModules, "bdist_wheel": Wheel},
    )


if __name__ == "__main__":
    main()
