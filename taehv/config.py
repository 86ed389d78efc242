"""Settings from TOML and dotted command-line overrides, merged and told apart.

Precedence is command line over TOML over default.
Every mistake is a UserError of one line, raised before any process group starts.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import json
import math
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

import tomli

from taehv.errors import UserError, nearest, run_command
from taehv.rules import check_batch, check_config, check_mesh, check_paths
from taehv.sections import Config, get

T = TypeVar("T")
INDIFFERENT = {
    *("job", "cache", "parallelism", "compile", "checkpoint", "logging"),
    *("validation.interval", "validation.best", "validation.patience"),
    *("validation.lpips", "validation.st_lpips", "validation.vmaf"),
    *("data.root", "data.annotations", "data.cache", "data.workers", "data.prefetch"),
    *("data.sources", "data.index", "proxy"),
    *("model.checkpoint", "model.initialization", "training.local_batch_size"),
    *("training.device", "training.max_bad_steps", "training.find_batch_size"),
    *("training.gc_interval", "training.start_timeout", "training.step_timeout"),
}
"""Sections and settings that do not change what a run computes, but for rounding, from
the files that it is given, nor by which clips it is judged."""


def load_config(argv: Sequence[str], world_size: int | None = None) -> Config:
    """Merge defaults, the TOML file after --config and the overrides, and check them.

    Args:
        argv: command line without the program's name.
        world_size: processes of the run; by default torchrun's WORLD_SIZE, else 1.

    Raises:
        UserError: anything a user got wrong, in one line that names the cure.
    """
    config = read_config(argv)
    world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    check_batch(config, world_size)
    check_mesh(config.parallelism, world_size)
    return config


def read_config(argv: Sequence[str], prog: str | None = None) -> Config:
    """As load_config, without the checks of how processes share a training step.

    `prog` is what --help calls the program.
    """
    arguments = _parser(prog).parse_args(_expanded(argv))
    config = Config()
    if arguments.config is not None:
        _merge(config, _read_toml(arguments.config), arguments.config)
    overrides = {k: v for k, v in vars(arguments).items() if "." in k and v is not None}
    for key, text in overrides.items():
        _set(config, key, _value_of(text, _types()[key]), "the command line")
    check_config(config)
    return config


def dumps(config: Config) -> str:
    """The merged settings as TOML, which --config takes back."""
    lines = []
    for name, section in asdict(config).items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in section.items()]
        lines.append("")
    return "\n".join(lines)


def table(kind: type[T], tree: Mapping[str, Any], where: str) -> T:
    """A dataclass of what a table of TOML holds.

    Raises:
        UserError: something is missing, unknown or of another type; it begins by where.
    """
    known = typing.get_type_hints(kind)
    values = {}
    for name, value in tree.items():
        if name not in known:
            raise UserError(f"{where}: unknown {name}{nearest(name, known)}")
        values[name] = _fitted(value, known[name])
        if values[name] is None:
            told = json.dumps(value, default=str)
            raise UserError(
                f"{where}: {name} = {told} must be {_type_name(known[name])}"
            )
    for field in fields(kind):
        is_needed = field.default is MISSING and field.default_factory is MISSING
        if is_needed and field.name not in values:
            raise UserError(f"{where}: {field.name} is missing")
    return kind(**values)


def changes(before: str, now: Config) -> dict[str, tuple[Any, Any]]:
    """The settings by which a run would go on otherwise than it began.

    Args:
        before: settings as `dumps` has them, of an older version perhaps: what it does
            not name has its default.
        now: the settings of the same run today.

    Returns:
        Both values, by the name of the setting.
    """
    old = tomli.loads(before)
    found = {}
    for key in _types():
        section, name = key.split(".")
        if not {section, key} & INDIFFERENT:
            value = old.get(section, {}).get(name, get(Config(), key))
            if value != get(now, key):
                found[key] = (value, get(now, key))
    return found


def _toml(value: Any) -> str:
    # JSON's texts, numbers, booleans and lists are TOML's, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read_toml(name: str) -> dict[str, Any]:
    if not name:
        raise UserError("--config is empty: name a TOML file")
    path = Path(name)
    try:
        return tomli.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"--config {path}: no such file; train_configs has some"
        ) from None
    except OSError as error:
        raise UserError(
            f"--config {path}: {error.strerror}: give a TOML file"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path} is not a text file in UTF-8") from None
    except tomli.TOMLDecodeError as error:
        raise UserError(f"--config {path} is not valid TOML: {error}") from None


def _merge(config: Config, tree: dict[str, Any], source: str) -> None:
    known = _types()
    sections = {key.split(".")[0] for key in known}
    for section, values in tree.items():
        if section not in sections:
            near = nearest(section, sections)
            raise UserError(f"{source}: unknown section [{section}]{near}")
        if not isinstance(values, dict):
            raise UserError(f"{source}: {section} is a section: write [{section}]")
        for name, value in values.items():
            _set(config, f"{section}.{name}", value, source)


def _set(config: Config, key: str, value: Any, source: str) -> None:
    known = _types()
    if key not in known:
        raise UserError(f"{source}: unknown setting {key}{nearest(key, known)}")
    section, name = key.split(".")
    fitted = _fitted(value, known[key])
    if fitted is None:
        default = json.dumps(get(Config(), key))
        raise UserError(
            f"{source}: {key} = {json.dumps(value, default=str)} must be "
            f"{_type_name(known[key])} (the default is {default})"
        )
    setattr(getattr(config, section), name, fitted)


@functools.cache
def _types() -> dict[str, Any]:
    """Of every setting; found once, which takes longer than reading a file."""
    config = Config()
    return {
        f"{section.name}.{name}": annotation
        for section in fields(config)
        for name, annotation in typing.get_type_hints(
            type(getattr(config, section.name))
        ).items()
    }


def _fitted(value: Any, annotation: Any) -> Any:
    """The value as the annotation wants it, or None where it does not fit."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        found = (_fitted(value, argument) for argument in arguments)
        return next((fitted for fitted in found if fitted is not None), None)
    if origin is Literal:
        return value if value in arguments and isinstance(value, str) else None
    if origin is list:
        if not isinstance(value, list):
            return None
        items = [_fitted(item, arguments[0]) for item in value]
        return None if None in items else items
    if annotation is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if number and math.isfinite(value) else None
    return value if type(value) is annotation else None


def _value_of(text: str, annotation: Any) -> Any:
    """A command-line text as the TOML value it stands for."""
    if annotation is str:
        return text
    if typing.get_origin(annotation) is list and not text.lstrip().startswith("["):
        element = typing.get_args(annotation)[0]
        parts = text.split(",") if text else []
        return [_value_of(part.strip(), element) for part in parts]
    if annotation is float and text.startswith("."):  # TOML wants the zero
        text = f"0{text}"
    text_in_toml = text.lower() if text.lower() in ("true", "false") else text
    try:
        return tomli.loads(f"v = {text_in_toml}")["v"]
    except tomli.TOMLDecodeError:
        return text


def _metavar(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return "|".join(_metavar(argument) for argument in arguments)
    if origin is Literal:
        return "|".join(arguments)
    if origin is list:
        return f"{_metavar(arguments[0])},..."
    return {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT"}[annotation]


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(json.dumps(argument) for argument in arguments)
    if origin is list:
        return f"a list, each {_type_name(arguments[0])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    return names[annotation]


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors that suggest the nearest setting."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        unknown = unknown.partition("=")[0]
        if message.startswith("unrecognized") and unknown.startswith("--"):
            known = [f"--{key}" for key in _types()]
            raise UserError(f"unknown setting {unknown}{nearest(unknown, known)}")
        raise UserError(f"command line: {message} (--help lists the settings)")


def _parser(prog: str | None) -> _Parser:
    parser = _Parser(
        prog=prog,
        usage="%(prog)s --config FILE [--section.setting VALUE ...]",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="settings in TOML")
    known = _types()
    for section in fields(Config):
        group = parser.add_argument_group(section.name)
        for name, text in _docs(type(getattr(Config(), section.name))).items():
            key = f"{section.name}.{name}"
            is_switch = bool in (known[key], *typing.get_args(known[key]))
            switch = {"nargs": "?", "const": "true"} if is_switch else {}
            default = json.dumps(get(Config(), key))
            group.add_argument(
                f"--{key}",
                metavar=_metavar(known[key]),
                help=f"{text} (default: {default})".replace("%", "%%"),
                **switch,
            )
    return parser


def _expanded(argv: Sequence[str]) -> list[str]:
    """Join values that begin with a dash to their option, which argparse requires."""
    joined: list[str] = []
    for word in argv:
        negative = len(word) > 1 and word[0] == "-" and (word[1].isdigit())
        if (
            negative
            and joined
            and joined[-1].startswith("--")
            and "=" not in joined[-1]
        ):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


@functools.cache
def _docs(section: type) -> dict[str, str]:
    """Each field's name with the text that stands under it in the source."""
    body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, below in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            docs[statement.target.id] = " ".join(below.value.value.split())  # type: ignore
    return docs


def main() -> None:
    """Say what is wrong with a command line, before torchrun starts any process.

    Else each process would say it, and torchrun add a page of its own.
    """
    check_paths(load_config(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
