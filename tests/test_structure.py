"""How the package is built: which module may import which, drawn in CONTRIBUTING and held here."""

import ast
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bertfast"
MOST_ENTRIES, MOST_LINES = 17, 500
SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h"}


class Floor(NamedTuple):
    modules: str
    what: str


# From the top down. A module imports from floors below its own only; a new one gets its place here.
FLOORS = (
    Floor("__main__", "python -m bertfast"),
    Floor("recipes", "training and embedding, each a command: pretrain, finetune, embed"),
    Floor("commands", "the command line: demo, bench, verify, kernels, tune, env"),
    Floor("__init__", "what `import bertfast` gives"),
    Floor("convert", "optimize, revert, report"),
    Floor("hf torch_nn", "families of models and their swapped classes"),
    Floor("graphs", "CUDA graphs by bucket"),
    Floor("nn testing", "a layer as data flows through it; case tables and the error budget"),
    Floor("ops", "the fused ops, a folder each, and what their backends share"),
    Floor("packing", "a padded batch as packed tokens: lengths, tiles"),
    Floor("notice settings", "warnings, once; what a converted module was told"),
    Floor("checks tracing", "what functions are given; what torch is doing now"),
)

# Backend of an op -> how the names of its files in bertfast/ops begin. None imports another's.
BACKENDS = {
    "torch": ("reference",),
    "triton": ("triton", "_triton"),
    "cuda": ("cuda", "native", "_native"),
    "onednn": ("onednn",),
}


def imports(package: Path) -> list[tuple[str, str]]:
    """The imports inside a package: (module, imported module), each as a dotted path."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = []
    for module, path in modules.items():
        home = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = home.split(".")[: len(home.split(".")) - node.level + 1]
                    base = ".".join([*parents, *([base] if base else [])])
                names = [f"{base}.{alias.name}" for alias in node.names]
                targets = [name if name in modules else base for name in names]
            else:
                continue
            found += [
                (module, target) for target in targets if target.split(".")[0] == home_of(home)
            ]
    return found


def home_of(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> tuple[int, str]:
    """The number of a module's floor, from the top, and its entry in the package."""
    entry = (module.split(".") + ["__init__"])[1]
    for number, listed in enumerate(FLOORS):
        if entry in listed.modules.split():
            return number, entry
    raise ValueError(f"{entry} must get a place in FLOORS of tests/test_structure.py")


def upward(arrows: list[tuple[str, str]]) -> list[str]:
    """Those that don't go down, but for what stays inside an entry."""
    wrong = []
    for module, target in arrows:
        (here, entry), (there, other) = floor(module), floor(target)
        if entry != other and there <= here:
            wrong.append(f"{module} -> {target}")
    return wrong


def backend(module: str) -> str | None:
    """The backend that a module of bertfast.ops belongs to; None for what they share."""
    if not module.startswith("bertfast.ops."):
        return None
    for part in module.split(".")[2:]:
        for name, beginnings in BACKENDS.items():
            if part in beginnings or part.startswith(tuple(f"{b}_" for b in beginnings)):
                return name
    return None


def between_backends(arrows: list[tuple[str, str]]) -> list[str]:
    return [
        f"{module} -> {target}"
        for module, target in arrows
        if backend(module) and backend(target) and backend(module) != backend(target)
    ]


def test_imports_go_down():
    arrows = imports(PACKAGE)
    assert ("bertfast.packing.layout", "bertfast.checks") in arrows
    assert not upward(arrows)


def test_backends_never_import_each_other():
    assert {backend(module) for module, _ in imports(PACKAGE)} == {None, *BACKENDS}
    assert not between_backends(imports(PACKAGE))


PLANTED = [
    ("packing/batch.py", "from ..ops import attention", "bertfast.packing.batch -> bertfast.ops"),
    ("checks.py", "from . import ops", "bertfast.checks -> bertfast.ops"),
    ("nn/encoder.py", "def f():\n    import bertfast", "bertfast.nn.encoder -> bertfast"),
    ("ops/foo/cuda.py", "from .triton import forward", "bertfast.ops.foo.cuda -> "),
    ("ops/foo/triton_fwd.py", "from .. import native", "bertfast.ops.foo.triton_fwd -> "),
    ("ops/foo/reference.py", "from ..triton_lib import f", "bertfast.ops.foo.reference -> "),
]


@pytest.mark.parametrize(("name", "text", "wrong"), PLANTED, ids=[name for name, *_ in PLANTED])
def test_a_wrong_import_is_found(name, text, wrong, tmp_path):
    files = ["__init__.py", "ops/__init__.py", "ops/foo/__init__.py", "ops/foo/triton.py"]
    files += ["packing/__init__.py", "nn/__init__.py", "ops/native.py", "ops/triton_lib.py"]
    for other in [*files, name]:
        path = tmp_path / "bertfast" / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert not imports(tmp_path / "bertfast")
    (tmp_path / "bertfast" / name).write_text(text)
    arrows = imports(tmp_path / "bertfast")
    (found,) = upward(arrows) + between_backends(arrows)
    assert found.startswith(wrong)


def test_a_new_module_needs_a_floor():
    with pytest.raises(ValueError, match="fresh must get a place in FLOORS"):
        floor("bertfast.fresh.part")


def test_the_package_has_few_entries_each_on_a_floor():
    built = re.compile(r"_build\.json|_(host|cuda).*\.(so|pyd)|__pycache__")
    entries = {path.name for path in PACKAGE.iterdir() if not built.fullmatch(path.name)}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
    modules = {Path(entry).stem for entry in entries - {"py.typed"}}
    assert modules == {module for listed in FLOORS for module in listed.modules.split()}


TOP = {
    *(
        ".ci",
        ".clang-format",
        ".github",
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
    ),
    *("MANIFEST.in", "README.md", "benchmarks", "bertfast", "bertfast-demo.png", "constraints.txt"),
    *("csrc", "docs", "pyproject.toml", "setup.py", "tests"),
}


def test_the_top_level_has_nothing_else():
    """Files that a slip of the shell left there were committed once."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip(listed.stderr)
    assert {name.partition("/")[0] for name in listed.stdout.split("\0") if name} == TOP


def test_no_file_is_long():
    folders = ("bertfast", "csrc", "tests", "benchmarks", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in [*files, ROOT / "setup.py"]
        if path.suffix in SUFFIXES
    }
    assert len(lines) > 100
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def drawing() -> str:
    """FLOORS and BACKENDS as CONTRIBUTING shows them."""
    lines = []
    for listed in FLOORS:
        lines.append(f"{', '.join(listed.modules.split()):<18} {listed.what}")
        if listed.modules == "ops":
            for name, beginnings in BACKENDS.items():
                files = ", ".join(
                    f"{beginning}*" for beginning in beginnings if beginning[0] != "_"
                )
                lines.append(f"{'':<18}   {name + ':':<8} {files}")
    return "\n".join(lines)


def test_contributing_draws_these_floors():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (drawn,) = re.findall(r"<!-- floors -->\n```text\n(.*?)\n```", text, re.DOTALL)
    assert drawn == drawing(), f"CONTRIBUTING.md must draw\n{drawing()}"


def test_docstrings_say_what_a_thing_is():
    """Each opens with a noun or a verb, not with a question's word."""
    words = ("What ", "Who ", "Where ", "Whether ")
    files = [
        p for folder in ("bertfast", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")
    ]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                if (ast.get_docstring(node) or "").startswith(words):
                    found.append(f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}")
    assert len(files) > 100 and not found
