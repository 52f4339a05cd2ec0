"""Access to the benchmarks and the demos, which stand beside the package in the source tree, not in the wheel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import nextquill
from nextquill.errors import ArgumentError


def require_checkout(command: str, folder: str) -> None:
    """Make a folder beside this package importable; a package of that name elsewhere is not ours.

    `make` has a target of the command's name, with a hyphen for a space.
    """
    root = Path(nextquill.__file__).resolve().parent.parent
    if not (root / folder / "__init__.py").is_file():
        raise ArgumentError(
            f"{command}: the {folder} are part of the source tree, not of an installed package ({root} has none); "
            f"clone nextquill and run `make {command.replace(' ', '-')}` there"
        )
    if sys.path[:1] != [str(root)]:
        sys.path.insert(0, str(root))


def checkout_module(command: str, module: str) -> Any:
    """Import a module of the source tree, after `require_checkout`."""
    require_checkout(command, module.partition(".")[0])
    return importlib.import_module(module)
