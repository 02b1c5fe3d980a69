"""Measurements of `bertfast tune` on this GPU, which "auto" follows before its table.

A JSON file for each kind of GPU, in the user's cache directory or where BERTFAST_TUNED says; empty,
that means none. It holds

    about      the GPU, the versions and the kernels that it was measured with
    backends   an op and a case -> the backend, and the microseconds of each that was tried
    splits     a pass of Triton's attention, or of its products with an activation, and a case ->
               the numbers of its split, likewise

It is read once. One that is broken, or was measured with anything else, is passed over with one
warning.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..notice import warn_once

VARIABLE = "BERTFAST_TUNED"


class Choice(NamedTuple):
    chosen: Any  # a backend's name, or the numbers of a split
    us: dict[str, float]  # of all that were tried


class Tuned(NamedTuple):
    backends: dict[str, Choice]
    splits: dict[str, Choice]


NOTHING = Tuned({}, {})


def key(*parts: object) -> str:
    """The name of a case in the file: "layer_norm bfloat16 768"."""
    return " ".join(str(part).removeprefix("torch.") for part in parts if part is not None)


def about(device: torch.device) -> dict[str, str]:
    """All that has to be the same for a measurement to hold: the GPU, versions, kernels."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": _triton_version(),
        "kernels": _kernels(),
    }


def path(device: torch.device) -> Path | None:
    """The place of a GPU's file, which may not be there; None where none is wanted."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return Path(cache) / "bertfast" / f"tuned-{name}.json"


def current(device: torch.device) -> Tuned:
    """The measurements that hold for a GPU."""
    return _held[-1] if _held else _of_file(device)


@contextlib.contextmanager
def held(choices: Tuned) -> Iterator[None]:
    """Within it these hold, in place of the file's; `forget` after one was added."""
    _held.append(choices)
    forget()
    try:
        yield
    finally:
        _held.pop()
        forget()


def forget() -> None:
    """Has each choice made anew, and the file read again."""
    _of_file.cache_clear()
    for clear in depending:
        clear()


_held: list[Tuned] = []
depending: list[Callable[[], None]] = []  # what forgets choices that were made by this


@functools.cache
def _of_file(device: torch.device) -> Tuned:
    file = path(device) if torch.cuda.is_available() else None
    if file is None:
        return NOTHING
    try:
        text = file.read_text()
    except FileNotFoundError:
        if os.environ.get(VARIABLE):
            warn_once(f"finds no file {str(file)!r}, which {VARIABLE} names")
        return NOTHING
    except (OSError, UnicodeDecodeError) as error:
        warn_once(f"can't read {str(file)!r}: {error}")
        return NOTHING
    try:
        found = read(text, device)
    except ValueError as error:
        warn_once(f"passes over {str(file)!r}: {error}. `bertfast tune` makes it anew")
        return NOTHING
    return found


def read(text: str, device: torch.device) -> Tuned:
    """The choices of a file's text; ValueError, with the reason, if it isn't for here."""
    try:
        content = json.loads(text)
        measured, here = dict(content["about"]), about(device)
        parts = [
            {
                name: Choice(_checked(part, line["chosen"]), dict(line["us"]))
                for name, line in content[part].items()
            }
            for part in Tuned._fields
        ]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no file of `bertfast tune` ({error})") from None
    for name, value in here.items():
        if measured.get(name) != value:
            raise ValueError(f"it was measured with {name} {measured.get(name)}, here is {value}")
    return Tuned(*parts)


def _checked(part: str, chosen: Any) -> Any:
    if part == "backends" and isinstance(chosen, str):
        return chosen
    if part == "splits" and isinstance(chosen, list) and len(chosen) in (0, 5, 7):
        if all(type(number) is int and 1 <= number <= 256 for number in chosen):
            return tuple(chosen)
    raise TypeError(f"{chosen!r} stands among {part}")


def write(file: Path, tuned: Tuned, device: torch.device) -> None:
    """Writes all of it or nothing: others may read the file meanwhile."""
    lines = {
        part: {name: choice._asdict() for name, choice in choices.items()}
        for part, choices in tuned._asdict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as made:
        try:
            json.dump({"about": about(device)} | lines, made, indent=1)
            made.write("\n")
            made.close()
            os.replace(made.name, file)
        except BaseException:
            os.unlink(made.name)
            raise


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "absent"
    return triton.__version__


@functools.cache
def _kernels() -> str:
    """A digest of the kernels and of what launches them."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    module = importlib.util.find_spec("bertfast._cuda")
    if module is not None and module.origin is not None:
        digest.update(Path(module.origin).read_bytes())
    return digest.hexdigest()[:12]
