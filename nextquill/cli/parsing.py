"""Turning a command line and a YAML file into dataclasses, with transformers' `HfArgumentParser`.

A `--config` file holds the same names as the flags; what is on the command line wins.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from nextquill.errors import NextQuillError


class UsageError(NextQuillError, ValueError):
    """A flag or a config key is wrong; nothing has been started."""


class _Parser(HfArgumentParser):
    """An HfArgumentParser that raises one line instead of printing two hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(
    command: str,
    description: str,
    option_types: Sequence[type],
    arguments: Sequence[str],
    *,
    defaults: dict[str, Any] | None = None,
    required: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Parse `arguments` into one instance of each of `option_types`.

    Args:
        command: the command's name.
        description: shown by --help.
        option_types: dataclasses; their fields are the flags.
        arguments: what followed the command.
        defaults: defaults that differ from the dataclasses'.
        required: flags that must be given although their dataclass has a default.

    Raises:
        UsageError: an unknown flag or key, a missing one, or a value of the wrong type.
    """
    parser = _Parser(list(option_types), allow_abbrev=False, prog=f"nextquill {command}", description=description)
    parser.add_argument("--config", help="A YAML file whose keys are these flags.")
    parser.epilog = "--debug, anywhere on the command line, shows the traceback of an error."
    parser.set_defaults(**(defaults or {}))
    for action in parser._actions:
        action.required = action.required or action.dest in required
    arguments = [*_config_arguments(arguments, _flag_names(parser)), *arguments]
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UsageError(_unknown_message(unknown[0], _flag_names(parser)))
    values = vars(namespace)
    return tuple(_instantiate(kind, values) for kind in option_types)


def _instantiate(kind: type, values: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(kind) if f.init}
    try:
        return kind(**{name: value for name, value in values.items() if name in names})
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error).strip().splitlines()[0]) from error


def _flag_names(parser: HfArgumentParser) -> list[str]:
    return sorted({name for action in parser._actions for name in action.option_strings if name.startswith("--")})


def _config_arguments(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The config file's keys as flags, so that they are checked and converted like flags."""
    path = _config_path(arguments)
    if path is None:
        return []
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UsageError(f"--config: expected a mapping of flags in {path}, got {type(content).__name__}")
    result: list[str] = []
    for key, value in content.items():
        if f"--{key}" not in flags or key in ("config", "help"):
            raise UsageError(f"--config: {path}: {_unknown_message(f'--{key}', flags)}")
        if value is not None:
            result += [f"--{key}", *_as_words(value)]
    return result


def _config_path(arguments: Sequence[str]) -> str | None:
    path = None
    for position, word in enumerate(arguments):
        if word == "--config":
            if position + 1 == len(arguments):
                raise UsageError("--config: expected a file name")
            path = arguments[position + 1]
        elif word.startswith("--config="):
            path = word.split("=", 1)[1]
    return path


def _as_words(value: Any) -> list[str]:
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


def _unknown_message(flag: str, flags: Sequence[str]) -> str:
    name = flag.split("=", 1)[0]
    close = difflib.get_close_matches(name, flags, n=1)
    return f"unknown flag {name}" + (f"; did you mean {close[0]}?" if close else "")
