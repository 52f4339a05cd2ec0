"""Turning a command line and a YAML file into dataclasses, with transformers' `HfArgumentParser`.

A `--config` file holds the same names as the flags; the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from nextquill.cli.flags import UsageError, config_path, read_config
from nextquill.cli.help import help_text
from nextquill.cli.known_flags import unknown_flag
from nextquill.errors import NextQuillError
from nextquill.storage.json_files import parsed

#: Flags that are not booleans and take "true".
_BARE_MEANS_TRUE = ("resume_from_checkpoint",)
#: Errors of transformers and PEFT about values they do not take.
REFUSALS = (ValueError, TypeError, ImportError, RuntimeError)
#: The same, with the errors of their lookups by name and of their dataclasses.
WIDE_REFUSALS = (*REFUSALS, KeyError, IndexError, AttributeError)


class Parser(HfArgumentParser):
    """An HfArgumentParser that raises an error of one line instead of printing two hundred flags.

    Args:
        command, description: for --help.
        option_types: dataclasses; their fields are the flags.
        defaults: defaults that differ from the dataclasses'.
        required: flags that must be given although their dataclass has a default.
    """

    def __init__(
        self,
        command: str,
        description: str,
        option_types: Sequence[Any],
        defaults: dict[str, Any],
        required: Sequence[str],
    ) -> None:
        super().__init__(list(option_types), allow_abbrev=False, prog=f"nextquill {command}", description=description)
        self.add_argument("--config", metavar="FILE", help="A YAML file whose keys are these flags.")
        self.set_defaults(**defaults)
        self.required = {action.dest for action in self._actions if action.required} | set(required)
        self.takes_mapping = {
            name for kind in option_types for name, hint in get_type_hints(kind).items() if "dict" in str(hint)
        }
        for action in self._actions:
            action.required = False  # checked at the end, over the config file and the flags together
            if action.nargs is None and (action.type is string_to_bool or action.dest in _BARE_MEANS_TRUE):
                action.nargs, action.const = "?", True if action.type is string_to_bool else "true"

    def error(self, message: str) -> NoReturn:
        raise UsageError(re.sub(r"(--\w+)(?:/--[\w-]+)+", r"\1", message))

    def format_help(self) -> str:
        return help_text(self, self.required)

    def flags(self) -> dict[str, argparse.Action]:
        """Every spelling of every flag."""
        return {name: action for action in self._actions for name in action.option_strings if name.startswith("--")}

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """The values of all flags, each of the right type."""
        namespace, unknown = self.parse_known_args(list(words))
        if unknown:
            raise UsageError(self.unknown_message(unknown[0]))
        values = vars(namespace)
        for name in self.takes_mapping:
            _check_json(name, values.get(name))
        for name, value in values.items():
            for each in value if isinstance(value, list) else [value]:
                _check_characters(name, each)
        return values

    def unknown_message(self, word: str) -> str:
        if not word.startswith("-"):
            return f"unexpected argument {word!r}; every value follows its flag"
        return unknown_flag(word, {flag[2:].replace("-", "_"): action.dest for flag, action in self.flags().items()})


def parse(
    command: str,
    description: str,
    option_types: Sequence[type],
    arguments: Sequence[str],
    *,
    defaults: dict[str, Any] | None = None,
    required: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Parse `arguments` into one instance of each of `option_types`; see `Parser`."""
    parser = Parser(command, description, option_types, defaults or {}, required)
    values = parser.parse([*_config_words(parser, arguments), *arguments])
    missing = sorted(name for name in parser.required if values[name] is None)
    if missing:
        raise UsageError(f"expected {', '.join(f'--{name}' for name in missing)}")
    return tuple(_instantiate(kind, values) for kind in option_types)


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def refusals(flag: str | None = None, *, kinds: tuple[type[Exception], ...] = REFUSALS) -> Iterator[None]:
    """Turn other packages' errors about a value into UsageError, which names the flag if it is given.

    nextquill's own errors pass.
    """
    try:
        yield
    except NextQuillError:
        raise
    except kinds as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise UsageError(one_line(error), argument=flag) from error


def _instantiate(kind: type, values: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(kind) if f.init}
    try:
        return kind(**{name: value for name, value in values.items() if name in names})
    except (*WIDE_REFUSALS, OSError) as error:
        file = getattr(error, "filename", None)
        flag = next((name for name, value in values.items() if file is not None and value == file), None)
        raise UsageError(one_line(error), argument=flag) from error


def _check_json(name: str, value: Any) -> None:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            parsed(value)
        except ValueError as error:
            raise UsageError(f"argument --{name}: not JSON: {error}") from error


def _check_characters(name: str, value: Any) -> None:
    """Refuse text that no file's name and no file can hold; bytes that are not UTF-8 arrive as halves of surrogates."""
    if isinstance(value, str) and ("\0" in value or value.encode(errors="ignore").decode() != value):
        raise UsageError(f"argument --{name}: expected UTF-8 without null bytes, got {value!r}")


def _config_words(parser: Parser, arguments: Sequence[str]) -> list[str]:
    """The config file's keys as flags, so that they are checked and converted like flags."""
    path = config_path(arguments)
    if path is None:
        return []
    flags, words = parser.flags(), list[str]()
    for key, value in read_config(path).items():
        flag = f"--{key}"
        if flag not in flags or key in ("config", "help"):
            raise UsageError(f"--config: {path}: {parser.unknown_message(flag)}")
        if value is None:
            continue
        try:
            found = _as_words(parser, flags[flag], flag, value)
            parser.parse(found)
        except UsageError as error:
            raise UsageError(f"--config: {path}: {error}") from error
        words += found
    return words


def _as_words(parser: Parser, action: argparse.Action, flag: str, value: Any) -> list[str]:
    """One key of a config file as command-line words; `--flag=value`, as a value may begin with a dash."""
    if isinstance(value, list):
        if any(isinstance(item, (list, dict)) for item in value):
            raise UsageError(f"argument {flag}: expected a list of plain values, got one inside it")
        if action.nargs == "+":
            return [flag, *(_as_word(action, item) for item in value)]
        if len(value) != 1:
            raise UsageError(f"argument {flag}: expected one value, got a list of {len(value)}")
        return [f"{flag}={_as_word(action, value[0])}"]
    if isinstance(value, dict):
        if action.dest not in parser.takes_mapping:
            raise UsageError(f"argument {flag}: expected one value, got a mapping")
        return [f"{flag}={json.dumps(value)}"]
    return [f"{flag}={_as_word(action, value)}"]


def _as_word(action: argparse.Action, value: Any) -> str:
    if isinstance(value, bool):
        if "no" in (action.choices or ()):  # YAML reads a bare `no` as false
            return "yes" if value else "no"
        return str(value).lower()
    return str(value)
