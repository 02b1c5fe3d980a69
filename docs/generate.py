"""The API reference, docs/api.md, made of signatures and docstrings.

python docs/generate.py            writes docs/api.md
python docs/generate.py --check    exit status 1 if docs/api.md isn't what would be written
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import bertfast
from bertfast import graphs, nn, ops, packing
from bertfast.recipes import embed

API = Path(__file__).with_name("api.md")
HEAD = """# API reference

Generated from the docstrings by `docs/generate.py`. The [README](../README.md) shows how the parts
are used together.
"""
# Module -> the names that are documented, in this order.
PUBLIC: dict[ModuleType, tuple[str, ...]] = {
    bertfast: ("optimize", "revert", "report", "disabled"),
    ops: tuple(sorted(ops.__all__)),
    packing: ("plan", "lay_out", "useful_share", "Plan"),
    nn: ("Encoder", "EncoderLayer"),
    graphs: ("warm_up", "Limits"),
    embed: ("Embedder", "CrossScorer"),
}


def main() -> int:
    """The exit status."""
    text = render()
    if "--check" in sys.argv[1:]:
        return int(API.read_text() != text)
    API.write_text(text)
    return 0


def render() -> str:
    parts = [HEAD]
    for module, names in PUBLIC.items():
        first, *_ = inspect.getdoc(module).split("\n\n")
        parts.append(f"## {module.__name__}\n\n{first}\n")
        for name in names:
            value = getattr(module, name)
            parts.append(f"### {module.__name__}.{name}\n\n{_code(value, name)}\n")
            if text := inspect.getdoc(value):
                parts.append(f"{_marked(text, value)}\n")
    return "\n".join(parts)


def _code(value: type | Callable, name: str) -> str:
    if not inspect.isclass(value):
        return _block(_signature(value, name))
    if "__init__" in value.__dict__ and not hasattr(value, "__dataclass_fields__"):
        return _block(_signature(value.__init__, name))
    fields = [f"{key}: {_text(kind)}" for key, kind in inspect.get_annotations(value).items()]
    return _block("\n".join([f"class {name}:", *(f"    {field}" for field in fields)]))


def _marked(text: str, value: type | Callable) -> str:
    """The docstring with the name of each argument that a paragraph explains as code."""
    names = "|".join(inspect.signature(value).parameters) or "-"
    return re.sub(rf"^({names}): ", r"`\1`: ", text, flags=re.MULTILINE)


def _block(code: str) -> str:
    return f"```python\n{code}\n```"


def _signature(function: Callable, name: str) -> str:
    """As in the source, whose annotations read the same in every Python: one line if it fits, else
    a line for each argument."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    arguments = node.args
    if arguments.args and arguments.args[0].arg == "self":
        del arguments.args[0]
    listed = [ast.unparse(arg) for arg in arguments.args]
    for place, default in zip(range(-len(arguments.defaults), 0), arguments.defaults, strict=True):
        listed[place] += f" = {ast.unparse(default)}"
    if arguments.kwonlyargs:
        listed.append("*")
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            given = "" if default is None else f" = {ast.unparse(default)}"
            listed.append(ast.unparse(argument) + given)
    if arguments.kwarg:
        listed.append(f"**{ast.unparse(arguments.kwarg)}")
    result = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    line = f"{name}({', '.join(listed)}){result}".replace("'", '"')
    if len(line) <= 100:
        return line
    listed = "".join(f"    {argument},\n" for argument in listed).replace("'", '"')
    return f"{name}(\n{listed}){result}"


def _text(kind: object) -> str:
    return kind if isinstance(kind, str) else inspect.formatannotation(kind)


if __name__ == "__main__":
    sys.exit(main())
