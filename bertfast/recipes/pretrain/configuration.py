"""Options as flags of a command and as keys of a file, both made of a dataclass's fields."""

import dataclasses
import inspect
import operator
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from ...commands.errors import UserError, one_of


def as_command(name: str, options: Any, run: Callable[[Any], int]) -> Callable[..., int]:
    """A function with a parameter for each option, for typer to make a command of."""
    kinds = typing.get_type_hints(options)
    fields = dataclasses.fields(options)

    def command(**given: Any) -> int:
        return run(options(**given))

    parameters = []
    for option in fields:
        about = option.metadata
        known = about.get("known")
        shown = typer.Argument if about.get("argument") else typer.Option
        more: dict[str, Any] = {"metavar": f"[{'|'.join(known)}]"} if known else {}
        about = shown(help=about["help"], **more)
        kind: Any = operator.getitem(typing.Annotated, (kinds[option.name], about))  # type: ignore[call-overload]
        default = _default(option)
        parameters.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
                annotation=kind,
            )
        )
    made: Any = command
    made.__name__, made.__doc__ = name, inspect.getdoc(options)
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _default(option: Any) -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def read(path: str, kinds: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The sections of a YAML file, in the order of `kinds`: name and options. All are checked
    before the first is given."""
    import yaml

    try:
        told = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path!r} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path!r} is no YAML: {error}") from None
    if not isinstance(told, dict) or not told:
        raise UserError(f"{path!r} must have sections: {', '.join(kinds)}")
    for name in told:
        one_of(f"a section of {path!r}", str(name), kinds)
    return iter(
        [(name, _section(path, name, told[name], kinds[name])) for name in kinds if name in told]
    )


def _section(path: str, name: str, told: Any, options: Any) -> Any:
    if told is None:
        told = {}
    if not isinstance(told, dict):
        raise UserError(f"{path!r}: {name} must have options, one a line, got {told!r}")
    kinds = typing.get_type_hints(options)
    given = {}
    for key, value in told.items():
        option = one_of(f"{path!r}: an option of {name}", str(key).replace("-", "_"), kinds)
        given[option] = _converted(f"{path!r}: {name}: {key}", value, kinds[option])
    try:
        return options(**given)
    except UserError as error:
        raise UserError(f"{path!r}: {name}: {error}") from None
    except TypeError as error:  # one without a default
        raise UserError(f"{path!r}: {name}: {error}") from None


def _converted(where: str, value: Any, kind: Any) -> Any:
    """The value as the option's type; an int may stand for a float, and YAML reads 1e-4 as text."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None:
            return None
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) in (list, tuple):
        inner = typing.get_args(kind)[0]
        items = value if isinstance(value, list) else [value]
        return typing.get_origin(kind)(_converted(where, item, inner) for item in items)
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, kind) and (kind is not int or not isinstance(value, bool)):
        return value
    raise UserError(f"{where} must be of type {kind.__name__}, got {value!r}")
