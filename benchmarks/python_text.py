"""English text that every Python brings along, some 2.1 million characters: its documentation's
topics, and the docstrings of the standard library, a document for each module.

python benchmarks/python_text.py FILE.jsonl        writes it
"""

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

# Not of the library itself, or not in every installation.
PASSED_OVER = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def documents() -> Iterator[str]:
    """Each with at least one word, in an order that depends on the Python alone."""
    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not PASSED_OVER.intersection(path.relative_to(library).parts):
            text = "\n\n".join(docstrings(path))
            if text.strip():
                yield text


def docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and the like
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def write(path: Path, least: int | None = None) -> dict[str, str | int]:
    """JSON lines with a document each; how much it is. least: stops at so many characters."""
    texts, characters = [], 0
    for text in documents():
        texts.append(text)
        characters += len(text)
        if least is not None and characters >= least:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return {"documents": len(texts), "characters": characters, "sha256": digest}


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
