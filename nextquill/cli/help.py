"""The text of `nextquill COMMAND --help`: a short usage line, then the flags under headings.

A heading is how the dataclass's docstring begins: "data" for "Data: the records, and the folder that a run writes." A
class with the attribute `OUTPUT_DIR` or `LEARNING_RATE` shows that flag of TrainingArguments under its own heading,
with that help.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import shutil
from collections.abc import Collection
from typing import Any

_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}
_WIDTH = 110
#: A longer list of choices goes below its flag instead of beside it.
_MOST_CHOICES_BESIDE = 4


def help_text(parser: Any, required: Collection[str]) -> str:
    """The help of an `HfArgumentParser`; `required` are the destinations of the flags that must be given."""
    formatter = _Formatter(parser.prog, width=min(_WIDTH, shutil.get_terminal_size().columns))
    actions = {action.dest: action for action in reversed(parser._actions)}  # a flag before its `--no_` twin
    needed = [name for name in actions if name in required][::-1]
    usage = [f"--{name} {formatter.value_name(actions[name])}" for name in needed]
    formatter.add_usage(" ".join([parser.prog, *usage, "[options]"]), [], [])
    formatter.add_text(parser.description)
    for kind in parser.dataclass_types:
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        names.sort(key=inspect.get_annotations(kind).__contains__, reverse=True)  # before those it inherits
        for name in ("output_dir", "learning_rate"):
            if hasattr(kind, name.upper()):
                actions[name].help = getattr(kind, name.upper())
                names.append(name)
        formatter.start_section(_heading(kind))
        formatter.add_arguments([actions.pop(name) for name in names if name in actions])
        formatter.end_section()
    formatter.start_section("general")
    formatter.add_arguments([actions["config"], actions["help"]])
    formatter.end_section()
    formatter.add_text(
        "Hyphens work as underscores. A true/false flag alone means true. --debug, anywhere on the command line, "
        "shows the traceback of an error."
    )
    return formatter.format_help()


def _heading(kind: type) -> str:
    package = kind.__module__.partition(".")[0]
    if package != "nextquill":
        return f"{package}' {kind.__name__}"
    name = re.split(r"[:.]", kind.__doc__ or kind.__name__, maxsplit=1)[0]
    return name.lower() if name == name.capitalize() else name  # not "LoRA"


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str, width: int) -> None:
        super().__init__(prog, max_help_position=30, width=width)

    def value_name(self, action: argparse.Action) -> str:
        """The placeholder of a flag's value."""
        if action.metavar is not None:
            return str(action.metavar)
        if action.dest == "output_dir":
            return "DIR"
        if action.const is True:
            return "[true|false]"
        if action.choices is not None:
            choices = list(map(str, action.choices))
            return f"{{{','.join(choices)}}}" if len(choices) <= _MOST_CHOICES_BESIDE else "NAME"
        kind = action.type if isinstance(action.type, type) else str
        return f"{_METAVARS.get(kind, 'TEXT')}{' ...' if action.nargs == '+' else ''}"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {self.value_name(action)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split())
        if action.choices is not None and len(list(action.choices)) > _MOST_CHOICES_BESIDE:
            text += f" One of: {', '.join(map(str, action.choices))}."
        default = getattr(action.default, "value", action.default)
        if isinstance(default, list):
            default = " ".join(map(str, default))
        shown = default is not None and default is not False and default not in ("", argparse.SUPPRESS)
        return f"{text} (default: {default})" if shown and "default" not in text.lower() else text
