"""Builds the program of this folder's kernels, in three ways, once for all tests."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent
CSRC = SOURCES.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-pthread"]
FLAGS += ["-DBERTFAST_HOST", "-Wno-unknown-pragmas", "-Wno-psabi", f"-I{CSRC}", f"-I{SOURCES}"]


class Program:
    """One build of the program. It runs one case at a time, in a process of its own.

    other: a build that differs in the given sources only, whose objects serve here too."""

    def __init__(
        self,
        directory: Path,
        extra_flags: list[str],
        sources: list[Path],
        other: "Program | None" = None,
    ) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs g++")
        command = [compiler, *FLAGS, *extra_flags]
        self.objects = dict(other.objects if other else {})
        self.objects |= {source: str(directory / f"{source.name}.o") for source in sources}

        def compile_one(source: Path) -> None:
            compile_flags = ["-x", "c++", "-c", str(source), "-o", self.objects[source]]
            subprocess.run([*command, *compile_flags], check=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources))
        self.path = str(directory / "host_runtime")
        subprocess.run([*command, *self.objects.values(), "-o", self.path], check=True)

    def run(
        self,
        case: str,
        *arguments: object,
        order: str = "depth-first",
        seed: int = 7,
        data: bytes = b"",
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.path, order, str(seed), case, *map(str, arguments)],
            input=data,
            capture_output=True,
            env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
            timeout=60,
        )

    def good(self, case: str, *arguments: object, **options: object) -> str:
        """The output of a case that must succeed."""
        result = self.run(case, *arguments, **options)
        assert result.returncode == 0, result.stderr.decode()
        assert result.stderr == b""
        return result.stdout.decode()

    def fault(self, case: str, *arguments: object, **options: object) -> str:
        """The message of a case that must fail."""
        result = self.run(case, *arguments, **options)
        assert result.returncode == 1, result.stdout
        return result.stderr.decode()


def all_sources() -> list[Path]:
    return sorted(CSRC.glob("host/*.cpp")) + sorted(SOURCES.glob("*.c*"))


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("plain"), ["-O2"], all_sources())


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Without optimisation, which takes half the compiler's time and leaves all accesses there."""
    flags = ["-fsanitize=address", "-O0"]
    return Program(tmp_path_factory.mktemp("sanitized"), flags, all_sources())


@pytest.fixture(scope="session")
def portable(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Switches stacks by ucontext, as on processors for which there is no assembly."""
    setting, header = "BERTFAST_UCONTEXT", "host/fiber.h"
    files = [path for path in [*CSRC.rglob("*.*"), *SOURCES.glob("*.*")] if path.is_file()]
    affected = [path for path in files if setting in (text := path.read_text()) or header in text]
    sources = [path for path in all_sources() if path in affected]
    assert {*affected} - {*sources} == {CSRC / header, Path(__file__)}
    flags = ["-O2", f"-D{setting}"]
    return Program(tmp_path_factory.mktemp("portable"), flags, sources, program)
