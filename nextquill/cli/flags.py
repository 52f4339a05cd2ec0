"""What every command's flags are made of, and checked with; light, so that a command loads no more than it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from nextquill.errors import ArgumentError, OutputExistsError


def option(help: str, default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A field whose metadata are what argparse's `add_argument` takes."""
    return field(default=default, metadata={"help": help, **metadata})


def check_positive(options: Any, names: Sequence[str]) -> None:
    """Raise ArgumentError where one of these fields is set and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name}: expected a positive number, got {value}")


def claim_output_file(path: str, *, overwrite: bool, flag: str = "output_file") -> Path:
    """Make sure, before any work, that a file can be written, and make its folder.

    Raises:
        OutputExistsError: something is there, or the folder is no folder.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputExistsError(f"--{flag}: {target} is a folder")
    if target.exists() and not target.is_file():  # /dev/null would be replaced by a file of that name
        raise OutputExistsError(f"--{flag}: {target} is no file that can be replaced")
    if target.exists() and not overwrite:
        raise OutputExistsError(f"--{flag}: {target} exists; give another name or --overwrite")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputExistsError(f"--{flag}: {target.parent} is a file") from error
    return target
