"""Helpers to declare and check a command's flags; light, so that a command loads no more than it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from nextquill.errors import ArgumentError, NextQuillError, OutputExistsError, RecordError
from nextquill.ranks import on_first
from nextquill.storage.atomic_files import temporary
from nextquill.storage.input_files import read_input
from nextquill.storage.locks import claim

#: The size of the largest file of flags; PyYAML reads some 100 KiB a second.
_MOST_CONFIG_BYTES = 256 * 2**10


class UsageError(NextQuillError, ValueError):
    """A flag or a config key is wrong; nothing has been started."""


def option(help: str, default: Any = dataclasses.MISSING, aliases: Sequence[str] = (), **metadata: Any) -> Any:
    """A field whose metadata are arguments of argparse's `add_argument`; each instance gets its own copy of a list.

    `aliases` are other names of the flag, which --help does not show.
    """
    metadata["help"] = help
    metadata["aliases"] = [f"--{name}" for alias in aliases for name in dict.fromkeys((alias, alias.replace("_", "-")))]
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def dry_run_option() -> Any:
    """The field of --dry_run, which several commands have."""
    help = "Check everything, time a step or a few records, print what the run would take, and write nothing."
    return option(help, False)


def check_positive(options: Any, names: Sequence[str]) -> None:
    """Raise ArgumentError where one of these fields is set and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ArgumentError(f"{name}: expected a positive number, got {value}")


def check_file(flag: str, path: str) -> None:
    """Raise RecordError where there is no such file."""
    if not Path(path).is_file():
        raise RecordError(f"{flag}: {path} is not a file")


def claim_output_file(path: str, *, overwrite: bool, flag: str = "output_file") -> Path:
    """Make sure, before any work, that a file can be written, make its folder, and keep other processes from it.

    Of joined processes the first one does so for all.
    """

    def claimed() -> Path:
        target = check_output_file(path, overwrite=overwrite, flag=flag)
        try:
            claim(temporary(target), target, flag)
        except NextQuillError:
            raise
        except OSError as error:
            raise OutputExistsError(f"{flag}: {target} cannot be written: {error.strerror or error}") from error
        return target

    return on_first(claimed)


def check_output_file(path: str, *, overwrite: bool, flag: str = "output_file") -> Path:
    """Make sure, before any work, that a file can be written, and make its folder."""
    target = Path(path)
    if target.is_dir():
        raise OutputExistsError(f"{flag}: {target} is a folder")
    if target.exists() and not target.is_file():  # /dev/null would be replaced by a file of that name
        raise OutputExistsError(f"{flag}: {target} is not a file that can be replaced")
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{flag}: {target} exists; give another name or --overwrite")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputExistsError(f"{flag}: {target.parent} is a file") from error
    return target


def read_config(path: str) -> dict[Any, Any]:
    """The flags in a YAML file, with their values."""
    try:
        text = read_input(path, _MOST_CONFIG_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    from nextquill.cli.yaml_file import read_yaml

    try:
        content = read_yaml(text)
    except ValueError as error:
        raise UsageError(f"--config: {path} is not YAML: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise UsageError(f"--config: expected a mapping of flags in {path}, got {type(content).__name__}")
    return content or {}


def config_path(arguments: Sequence[str]) -> str | None:
    """The file that --config names, or None."""
    path = None
    for position, word in enumerate(arguments):
        if word == "--config":
            if position + 1 == len(arguments):
                raise UsageError("--config: expected a file name")
            path = arguments[position + 1]
        elif word.startswith("--config="):
            path = word.split("=", 1)[1]
    return path
