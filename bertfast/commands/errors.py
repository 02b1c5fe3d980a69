"""A user's request that can't be met: one exception, and how it is found out early."""

import difflib
import importlib.metadata
import importlib.util
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """A request that a command can't meet. The command line prints the text and exits 2."""


def one_of(option: str, given: str, known: Iterable[str]) -> str:
    """The name, if it is known; otherwise an error that lists those that are."""
    names = list(known)
    if given in names:
        return given
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(given.lower(), by_lower, 1)
    hint = f"; did you mean {by_lower[close[0]]!r}?" if close else ""
    raise UserError(f"{option} must be one of {', '.join(names)}, got {given!r}{hint}")


def some_of(option: str, given: str, known: Iterable[str]) -> list[str]:
    """The names of a list such as "fp32,bf16", each once."""
    names = list(known)
    return list(dict.fromkeys(one_of(option, name.strip(), names) for name in given.split(",")))


def writable_file(option: str, path: Path) -> Path:
    """The path of a file that can be written: tried before the work, which would be lost."""
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise _unwritable(option, path, error) from None
    return path


def writable_directory(option: str, path: Path) -> Path:
    """The path of a directory that files can be written into. It is made if it isn't there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise _unwritable(option, path, error) from None
    return path


def _unwritable(option: str, path: Path, error: OSError) -> UserError:
    return UserError(f"{option}: {str(path)!r} can't be written: {error.strerror}")


def missing(modules: Sequence[str]) -> list[str]:
    """Those that can't be imported here."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def need(what: str, modules: Sequence[str], extra: str) -> None:
    """Raises UserError, with the way to get them, where one of the modules isn't installed."""
    if absent := missing(modules):
        raise UserError(f"{what} needs {', '.join(absent)}: {install_hint(extra)}")


def install_hint(extra: str) -> str:
    """The command that installs the packages of an extra. From a checkout it is pip's on the
    checkout; elsewhere it names the packages, as no index has bertfast."""
    checkout = PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "constraints.txt").is_file():
        if checkout == Path.cwd():
            return f"pip install -c constraints.txt -e '.[{extra}]'"
        return f"pip install -c '{checkout}/constraints.txt' -e '{checkout}[{extra}]'"
    wanted = []
    for line in importlib.metadata.requires("bertfast") or ():
        requirement, _, marker = line.partition(";")
        if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", marker):
            wanted.append(f"'{requirement.strip()}'")
    return f"pip install {' '.join(wanted)}"
